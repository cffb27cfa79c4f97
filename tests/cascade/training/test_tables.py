import numpy as np
import pytest
import torch

from cascade.checkpoints.load import EMBEDDED
from cascade.conditioning import TextEncoder
from cascade.training.code import scene_code
from cascade.training.control_inputs import Kind, Read
from cascade.training.scenes import SQUARE_SIZE, Scene
from cascade.training.stage_c import load_text_encoder
from cascade.training.tables import CPU, choose_table, embed_table, make_tables, plain_wording

SIZES = (SQUARE_SIZE, (384, 256))


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    text = load_text_encoder(EMBEDDED["tiny"])
    text.model.float()
    return text


def scenes_of(scenes: list[Scene]) -> dict[str, np.ndarray]:
    return {"own": np.stack([scene_code(scene) for scene in scenes])}


def test_a_table_has_the_codes_and_captions_of_its_scenes(text: TextEncoder) -> None:
    square, wide = make_tables(text, 50, seed=1, device=CPU, extras=scenes_of, sizes=SIZES, workers=0)
    assert [len(square), len(wide)] == [40, 10]
    assert square.codes.shape == (40, 16, 6, 6)
    assert wide.codes.shape == (10, 16, 6, 9)
    assert torch.equal(square.codes, square.extras["own"])
    assert (square.tokens == text.tokenizer.eos_token_id).any(1).all()


def test_the_same_seed_gives_the_same_table(text: TextEncoder) -> None:
    one, same, other = (
        make_tables(text, 12, seed=seed, device=CPU, sizes=(SQUARE_SIZE,), workers=0)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(one.codes, same.codes)
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.codes, other.codes)


def test_tokens_embed_as_their_words_do(text: TextEncoder) -> None:
    words: list[str] = []

    def wording(scene: Scene, rng: np.random.Generator) -> tuple[Scene, str]:
        words.append(plain_wording(scene, rng)[1])
        return scene, words[-1]

    [table] = make_tables(text, 8, seed=3, device=CPU, wording=wording, sizes=(SQUARE_SIZE,), workers=0)
    hidden, pooled = embed_table(text, table)
    encoded = text.encode(words)
    assert torch.allclose(hidden, encoded.hidden, atol=1e-5)
    assert torch.allclose(pooled, encoded.pooled, atol=1e-5)


def test_tables_are_chosen_by_their_lengths(text: TextEncoder) -> None:
    tables = make_tables(text, 50, seed=1, device=CPU, sizes=SIZES, workers=0)
    rng = np.random.default_rng(0)
    chosen = [choose_table(tables, rng).size for _ in range(400)]
    assert 0.7 < chosen.count(SQUARE_SIZE) / 400 < 0.9


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("canny", "edges", (1, 192, 192)),
        ("inpainting", "pixels", (3, 192, 192)),
        ("super_resolution", "pixels", (3, 96, 96)),
    ],
)
def test_controls_are_read_at_the_size_of_the_grid(
    text: TextEncoder, kind: Kind, name: str, shape: tuple[int, ...]
) -> None:
    [table] = make_tables(
        text,
        4,
        seed=5,
        device=CPU,
        extras=Read(kind),
        sizes=(SQUARE_SIZE,),
        workers=0,
    )
    made = table.extras[name]
    assert tuple(made.shape) == (4, *shape)
    assert made.float().std() > 1
