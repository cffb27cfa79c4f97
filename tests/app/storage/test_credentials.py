"""Content credentials: what signed pictures say, that they stay as they were, which mistakes are named."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from app.errors import SettingsError, SigningFailed
from app.storage import credentials
from app.storage.credentials import UNSIGNED, Credentials, make_credentials
from app.storage.encoding import MIME_TYPES, encode
from tests.app.certificates import (
    CLAIM_SIGNING,
    DAY,
    Identity,
    identity,
    manifest,
    new_key,
    problems,
    source_type,
)

FORMATS = list(MIME_TYPES)
PROMPT = "a very private prompt"
TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype"


@pytest.fixture
def files(tmp_path: Path) -> Identity:
    return identity(tmp_path)


@pytest.fixture
def signer(files: Identity) -> Credentials:
    return make_credentials(files.certificate, files.key)


def picture(output_format: Any) -> bytes:
    image = Image.effect_noise((96, 64), 80).convert("RGB")
    return encode(image, output_format, 90, f"{PROMPT}\nSteps: 20")


def opened(content: bytes) -> Image.Image:
    image = Image.open(BytesIO(content))
    image.load()
    return image


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_signed_picture_says_what_made_it_and_nothing_else(signer: Credentials, output_format: Any) -> None:
    plain = picture(output_format)
    signed = signer.sign(plain, output_format, is_edit=False)
    assert source_type(signed, output_format) == f"{TERMS}/trainedAlgorithmicMedia"
    found = manifest(signed, output_format)
    [software] = found["claim_generator_info"]
    assert software["name"] == "Stable Cascade Server"
    assert software["version"] == version("stable-cascade-server")
    assert found["signature_info"]["common_name"] == "Signer"
    assert not {"title", "thumbnail", "ingredients"} & found.keys()
    assert PROMPT not in str(found)
    # The text that was there before is the only one that has it.
    assert [text.count(PROMPT.encode()) for text in readable(signed)] == [
        text.count(PROMPT.encode()) for text in readable(plain)
    ]


def readable(content: bytes) -> tuple[bytes, bytes]:
    """A file as text of one and of two bytes a letter."""
    return content, content.replace(b"\0", b"")


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_redrawn_picture_says_that_it_was_one(signer: Credentials, output_format: Any) -> None:
    signed = signer.sign(picture(output_format), output_format, is_edit=True)
    assert source_type(signed, output_format) == f"{TERMS}/compositeWithTrainedAlgorithmicMedia"


@pytest.mark.parametrize("output_format", FORMATS)
def test_pixels_mark_and_settings_stay(signer: Credentials, output_format: Any) -> None:
    plain = picture(output_format)
    signed = signer.sign(plain, output_format, is_edit=False)
    assert len(plain) < len(signed) < len(plain) + 5000
    before, after = opened(plain), opened(signed)
    assert after.tobytes() == before.tobytes()
    assert after.format == before.format
    assert after.info["xmp"] == before.info["xmp"]
    assert after.info.get("parameters") == before.info.get("parameters")
    assert after.getexif().get_ifd(0x8769) == before.getexif().get_ifd(0x8769)


@pytest.mark.parametrize(
    ("output_format", "pixels"), [("png", b"IDAT"), ("jpeg", b"\xff\xda"), ("webp", b"VP8 ")]
)
def test_a_changed_byte_of_the_pixels_shows(signer: Credentials, output_format: Any, pixels: bytes) -> None:
    signed = bytearray(signer.sign(picture(output_format), output_format, is_edit=False))
    signed[signed.rindex(pixels) + 500] ^= 1
    assert "assertion.dataHash.mismatch" in problems(bytes(signed), output_format)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (new_key, "Es256"),
        (lambda: ec.generate_private_key(ec.SECP384R1()), "Es384"),
        (lambda: ec.generate_private_key(ec.SECP521R1()), "Es512"),
        (ed25519.Ed25519PrivateKey.generate, "Ed25519"),
        (lambda: rsa.generate_private_key(65537, 2048), "Ps256"),
    ],
    ids=["es256", "es384", "es512", "ed25519", "ps256"],
)
def test_the_algorithm_is_that_of_the_key(tmp_path: Path, key: Callable[[], Any], algorithm: str) -> None:
    files = identity(tmp_path, key())
    signed = make_credentials(files.certificate, files.key).sign(picture("png"), "png", is_edit=False)
    assert manifest(signed, "png")["signature_info"]["alg"] == algorithm


def test_the_certificates_of_the_official_trust_list_will_do(tmp_path: Path) -> None:
    files = identity(tmp_path, usage=CLAIM_SIGNING)
    signed = make_credentials(files.certificate, files.key).sign(picture("png"), "png", is_edit=False)
    manifest(signed, "png", usage=CLAIM_SIGNING.dotted_string)


def test_a_key_in_openssl_s_older_form_will_do(files: Identity) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    older = serialization.PrivateFormat.TraditionalOpenSSL
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, older, serialization.NoEncryption()))
    assert b"BEGIN EC PRIVATE KEY" in files.key.read_bytes()
    make_credentials(files.certificate, files.key)


def test_threads_sign_at_once(signer: Credentials) -> None:
    plain = {output_format: picture(output_format) for output_format in FORMATS}
    with ThreadPoolExecutor(4) as pool:
        work = [
            (kind, pool.submit(signer.sign, plain[kind], kind, is_edit=False))  # type: ignore[arg-type]
            for kind in FORMATS * 20
        ]
    names = {manifest(signed.result(), kind)["label"] for kind, signed in work}
    assert len(names) == len(work)


def test_without_a_key_nothing_is_signed_or_imported() -> None:
    plain = picture("png")
    assert make_credentials(None, None).sign(plain, "png", is_edit=False) is plain
    assert make_credentials(None, None) == UNSIGNED == Credentials()
    program = (
        "import sys, app.main; from app.storage.credentials import make_credentials\n"
        "make_credentials(None, None)\n"
        "sys.exit(bool({'c2pa', 'cryptography'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_the_extra_the_settings_are_a_mistake(
    files: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    message = refusal(files)
    assert "pip install 'stable-cascade-server[c2pa]'" in message


def refusal(files: Identity) -> str:
    """The one line that says why these files cannot be used, without a word of the key."""
    with pytest.raises(SettingsError) as caught:
        make_credentials(files.certificate, files.key)
    message = str(caught.value)
    assert "\n" not in message
    secret = files.key.read_text() if files.key.is_file() else ""
    assert not any(line in message for line in secret.splitlines() if line)
    return message


def test_files_that_cannot_be_used_are_named(files: Identity, tmp_path: Path) -> None:
    missing, rubbish = tmp_path / "missing.pem", tmp_path / "rubbish.pem"
    rubbish.write_text("-----BEGIN RUBBISH-----\n")
    for broken, words in [
        (Identity(missing, files.key), ["CASCADE_C2PA_CERTIFICATE", str(missing), "No such file"]),
        (Identity(files.certificate, missing), ["CASCADE_C2PA_KEY", str(missing), "No such file"]),
        (Identity(tmp_path, files.key), ["CASCADE_C2PA_CERTIFICATE", str(tmp_path), "directory"]),
        (Identity(rubbish, files.key), ["CASCADE_C2PA_CERTIFICATE", str(rubbish), "no certificate"]),
        (Identity(files.key, files.key), ["CASCADE_C2PA_CERTIFICATE", "no certificate"]),
        (Identity(files.certificate, rubbish), ["CASCADE_C2PA_KEY", str(rubbish), "no private key"]),
        (Identity(files.certificate, files.certificate), ["CASCADE_C2PA_KEY", "no private key"]),
    ]:
        message = refusal(broken)
        assert all(word in message for word in words), message


def test_a_key_of_another_certificate_is_named(files: Identity, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = identity(tmp_path / "other")
    message = refusal(Identity(files.certificate, other.key))
    assert message.startswith(f"CASCADE_C2PA_KEY: {other.key} is not the key")
    assert str(files.certificate) in message


def test_a_key_with_a_password_is_named(files: Identity) -> None:
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"x"),
    )
    files.key.write_bytes(locked)
    assert "needs a password" in refusal(files)


@pytest.mark.parametrize(
    "key",
    [lambda: ec.generate_private_key(ec.SECP256K1()), lambda: rsa.generate_private_key(65537, 1024)],
    ids=["secp256k1", "rsa1024"],
)
def test_a_key_that_c2pa_does_not_know_is_named(tmp_path: Path, key: Callable[[], Any]) -> None:
    message = refusal(identity(tmp_path, key()))
    assert "CASCADE_C2PA_KEY" in message
    assert "P-256" in message


@pytest.mark.parametrize(
    ("details", "words"),
    [
        ({"begins": -2 * DAY, "ends": -DAY}, "expired at 20"),
        ({"begins": DAY, "ends": 2 * DAY}, "not valid before 20"),
        ({"usage": ExtendedKeyUsageOID.SERVER_AUTH}, "cannot sign pictures: "),
        ({"usage": None}, "cannot sign pictures: "),
    ],
    ids=["expired", "early", "of a web server", "for nothing"],
)
def test_a_certificate_that_readers_would_refuse_is_named(
    tmp_path: Path, details: dict[str, Any], words: str
) -> None:
    files = identity(tmp_path, **details)
    message = refusal(files)
    assert f"CASCADE_C2PA_CERTIFICATE: {files.certificate}" in message
    assert words in message


def test_a_signature_that_does_not_verify_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = identity(tmp_path, usage=CLAIM_SIGNING)
    monkeypatch.setattr(credentials, "_usages", lambda _: [])  # as a reader who accepts no such certificate
    assert "failed validation" in refusal(files)


def test_what_cannot_be_signed_is_an_error(signer: Credentials) -> None:
    with pytest.raises(SigningFailed, match="log"):
        signer.sign(b"no picture", "png", is_edit=False)


def test_the_library_itself_refuses_an_expired_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = identity(tmp_path, begins=-2 * DAY, ends=-DAY)
    monkeypatch.setattr(credentials, "_require_valid_now", lambda *_: None)
    assert "not valid at time of signing" in refusal(files)


SIGN_WITHOUT_SOCKETS = """
import ctypes, platform, socket, struct, sys
from pathlib import Path
from app.storage.credentials import make_credentials

content = Path(sys.argv[1]).read_bytes()
socket_call = {"x86_64": 41, "aarch64": 198}[platform.machine()]
# Load the number of the system call; if it is socket(), kill the process, else allow the call.
program = b"".join(
    struct.pack("HBBI", *step)
    for step in [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, socket_call),
        (0x06, 0, 0, 0x80000000),
        (0x06, 0, 0, 0x7FFF0000),
    ]
)
code = ctypes.create_string_buffer(program)
rules = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(code)))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, rules, 0, 0):
    sys.exit(77)
if sys.argv[2] == "socket":
    socket.socket()
signer = make_credentials(Path(sys.argv[3]), Path(sys.argv[4]))
signer.sign(content, "png", is_edit=False)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to kill who opens a socket")
def test_signing_opens_no_socket(files: Identity, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    plain.write_bytes(picture("png"))

    def run(word: str) -> int:
        given = (plain, word, files.certificate, files.key)
        command = [sys.executable, "-c", SIGN_WITHOUT_SOCKETS, *map(str, given)]
        return subprocess.run(command, check=False).returncode

    if (ended := run("sign")) == 77:
        pytest.skip("this machine lets nobody filter system calls")
    assert ended == 0
    assert run("socket") == -31  # SIGSYS: whoever opens one is caught


def test_the_expiry_is_told_to_the_minute(tmp_path: Path) -> None:
    files = identity(tmp_path, begins=-2 * DAY, ends=timedelta(minutes=-1))
    assert refusal(files).endswith(" UTC")
