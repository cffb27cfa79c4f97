"""Installed LoRAs: what is in the folders now."""

import hashlib
from pathlib import Path

from app.storage.loras import InstalledLoRAs


def test_files_are_found_changed_and_forgotten(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    folders = [str(first), str(second), str(tmp_path / "absent")]
    shelf = InstalledLoRAs()
    assert shelf.all(folders) == []
    for folder in (first, second):
        folder.mkdir()
        (folder / "sketch.safetensors").write_bytes(folder.name.encode())
        (folder / "notes.txt").write_text("no LoRA")
    (first / "ink.safetensors").write_bytes(b"ink")
    assert shelf.names(folders) == ["ink", "sketch"]
    ink, sketch = shelf.all(folders)
    assert (ink.name, ink.num_bytes, ink.sha256) == ("ink", 3, hashlib.sha256(b"ink").hexdigest())
    assert sketch.sha256 == hashlib.sha256(b"second").hexdigest()  # the last folder counts
    (first / "ink.safetensors").write_bytes(b"blot")
    (second / "sketch.safetensors").unlink()
    assert [lora.sha256 for lora in shelf.all(folders)] == [
        hashlib.sha256(content).hexdigest() for content in (b"blot", b"first")
    ]
