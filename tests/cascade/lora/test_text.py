"""Learned tokens and changed text towers: for one request, without a trace in tokenizer and tower."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade.checkpoints.load import load_cascade
from cascade.errors import CheckpointError, InvalidSetting
from cascade.lora import combine, merge, read_lora
from cascade.models import Models
from tests.cascade.lora.files import factors_of, kohya, peft, save

REGEX = "^(red|blue)</w>$"


@pytest.fixture(scope="module")
def models() -> Models:
    return load_cascade("tiny", device="cpu")


@pytest.fixture(scope="module")
def added(models: Models) -> Tensor:
    width = models.text_encoder.model.config.hidden_size
    return torch.randn(1, width, generator=torch.Generator().manual_seed(1)) * 0.1


def token_file(path: Path, models: Models, added: Tensor, **metadata: str) -> Path:
    size = models.text_encoder.model.config.vocab_size
    return save(
        path,
        {"embeddings.indices": torch.tensor([size]), "embeddings.embeddings": added},
        **metadata,
    )


def by_hand(models: Models, prompt: str, added: Tensor) -> Tensor:
    """Hidden states of a prompt by a tokenizer and a tower that have learned the token for good."""
    tokenizer, model = copy.deepcopy(models.text_encoder.tokenizer), copy.deepcopy(models.text_encoder.model)
    vocabulary = tokenizer.get_vocab()
    table = model.get_input_embeddings().weight.detach()
    base = (table[vocabulary["red</w>"]] + table[vocabulary["blue</w>"]]) / 2
    tokenizer.add_tokens(["[new]"])
    model.text_model.embeddings.token_embedding = torch.nn.Embedding.from_pretrained(
        torch.cat([table, base + added])
    )
    window = models.text_encoder.max_tokens
    tokens = tokenizer(
        [prompt], padding="max_length", max_length=window, truncation=True, return_tensors="pt"
    )
    hidden: Tensor = model.text_model(**tokens, output_hidden_states=True).hidden_states[-1]
    return hidden


@pytest.mark.parametrize("where", ["metadata", "sidecar"])
def test_a_learned_token(models: Models, added: Tensor, tmp_path: Path, where: str) -> None:
    told = {"token": "[new]", "regex": REGEX}
    path = token_file(tmp_path / "some.safetensors", models, added, **(told if where == "metadata" else {}))
    if where == "sidecar":
        path.with_suffix(".json").write_text(json.dumps({"tokens": [told]}))
    adapter = combine(models, [(read_lora(path, models), 1.0)])
    for prompt in ("a [new] circle", "[new]", "a big [new], [new]circle", "[new] " * 40):
        embeddings = models.text_encoder.encode([prompt], adapter=adapter)
        expected = by_hand(models, prompt, added)
        torch.testing.assert_close(embeddings.hidden, expected, atol=1e-5, rtol=0, msg=prompt)
    assert models.text_encoder.encode(["a [new]"], adapter=adapter).num_tokens == (4,)
    with_it = models.text_encoder.encode(["a [new] circle"], adapter=adapter)
    without = models.text_encoder.encode(["a [new] circle"])
    assert without.num_tokens[0] > with_it.num_tokens[0]
    half = combine(models, [(read_lora(path, models), 0.5)])
    halved = models.text_encoder.encode(["a [new] circle"], adapter=half)
    torch.testing.assert_close(halved.hidden, by_hand(models, "a [new] circle", added / 2), atol=1e-5, rtol=0)


def test_prompts_without_the_token_keep_every_bit(models: Models, added: Tensor, tmp_path: Path) -> None:
    path = token_file(tmp_path / "some.safetensors", models, added, token="[new]", regex=REGEX)
    adapter = combine(models, [(read_lora(path, models), 1.0)])
    for prompt in ("a red circle", "", "a [ne w] circle, " * 20):
        plain = models.text_encoder.encode([prompt])
        with_it = models.text_encoder.encode([prompt], adapter=adapter)
        assert torch.equal(plain.hidden, with_it.hidden)
        assert torch.equal(plain.pooled, with_it.pooled)
        assert (plain.num_tokens, plain.truncated) == (with_it.num_tokens, with_it.truncated)


def test_a_learned_token_among_weights_and_chunks(models: Models, added: Tensor, tmp_path: Path) -> None:
    path = token_file(tmp_path / "some.safetensors", models, added, token="[new]", regex=REGEX)
    adapter = combine(models, [(read_lora(path, models), 1.0)])
    encoder = models.text_encoder
    plain = encoder.encode(["a [new] circle"], adapter=adapter)
    read = encoder.encode(["a [new] circle"], adapter=adapter, weighted=True, long=True)
    assert torch.equal(plain.hidden, read.hidden)
    for written in ("a [NEW] circle", "a [New] circle"):
        assert torch.equal(encoder.encode([written], adapter=adapter, weighted=True).hidden, plain.hidden)
    more = encoder.encode(["a ([new]:1.5) circle"], adapter=adapter, weighted=True)
    changed = (more.hidden - plain.hidden).abs().amax(dim=-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [2]
    long = encoder.encode(["[new] " * (encoder.max_tokens + 3)], adapter=adapter, long=True)
    assert long.hidden.shape[1] == 2 * encoder.max_tokens


def test_no_second_lora_changes_texts_beside_a_merged_one(
    models: Models, added: Tensor, tmp_path: Path
) -> None:
    path = token_file(tmp_path / "some.safetensors", models, added, token="[new]", regex=REGEX)
    lora = read_lora(path, models)
    adapter = combine(models, [(lora, 1.0)])
    encoder = merge(models, [(lora, 1.0)]).text_encoder
    expected = models.text_encoder.encode(["a [new] circle"], adapter=adapter, long=True)
    assert torch.equal(encoder.encode(["a [new] circle"], long=True).hidden, expected.hidden)
    with pytest.raises(InvalidSetting, match="beside a merged one"):
        encoder.encode(["a [new] circle"], adapter=adapter)


def test_a_known_token_may_be_changed(models: Models, added: Tensor, tmp_path: Path) -> None:
    red = models.text_encoder.tokenizer.get_vocab()["red</w>"]
    path = save(
        tmp_path / "some.safetensors",
        {"embeddings.indices": torch.tensor([red]), "embeddings.embeddings": added},
    )
    adapter = combine(models, [(read_lora(path, models), 1.0)])
    model = copy.deepcopy(models.text_encoder.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[red] += added[0]
    expected = type(models.text_encoder)(models.text_encoder.tokenizer, model).encode(["a red circle"])
    found = models.text_encoder.encode(["a red circle"], adapter=adapter)
    torch.testing.assert_close(found.hidden, expected.hidden, atol=1e-5, rtol=0)
    assert (found.hidden - models.text_encoder.encode(["a red circle"]).hidden).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_changed_text_tower(models: Models, tmp_path: Path, layout: str) -> None:
    tower = models.text_encoder.model
    names = [name for name, module in tower.named_modules() if isinstance(module, torch.nn.Linear)]
    factors = factors_of({name: tuple(tower.get_submodule(name).weight.shape) for name in names}, 3)
    write = {
        "kohya": lambda: kohya(factors, prefix="lora_prior_te_"),
        "peft": lambda: peft(factors, prefix="text_encoder."),
    }[layout]
    lora = read_lora(save(tmp_path / "some.safetensors", write()), models)
    adapter = combine(models, [(lora, 0.5)])
    changed = copy.deepcopy(tower)
    with torch.no_grad():
        for name, (down, up) in factors.items():
            changed.get_submodule(name).weight += 0.5 * (up @ down)
    before = models.text_encoder.encode(["a red circle"])
    expected = type(models.text_encoder)(models.text_encoder.tokenizer, changed).encode(["a red circle"])
    for encoder, given in (
        (models.text_encoder, adapter),
        (merge(models, [(lora, 0.5)]).text_encoder, None),
    ):
        found = encoder.encode(["a red circle"], adapter=given)
        torch.testing.assert_close(found.hidden, expected.hidden, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-4, rtol=1e-4)
    after = models.text_encoder.encode(["a red circle"])
    assert torch.equal(after.hidden, before.hidden)
    assert (expected.pooled - before.pooled).abs().max() > 0.01


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ({}, "1 new tokens, but 0 are described"),
        ({"token": "[new]"}, "described wrongly"),
        ({"token": "two words", "regex": "a"}, "without spaces"),
        ({"token": "[new]", "regex": "("}, "is none"),
        ({"token": "[new]", "regex": "^zebra</w>"}, "matches no token"),
        ({"token": "[new]", "regex": "(a+)+$"}, "no repetition within"),
        ({"tokens": "[[["}, "described wrongly"),
    ],
)
def test_wrong_descriptions(
    models: Models, added: Tensor, tmp_path: Path, metadata: dict[str, str], fault: str
) -> None:
    path = token_file(tmp_path / "some.safetensors", models, added, **metadata)
    with pytest.raises(CheckpointError, match=fault):
        combine(models, [(read_lora(path, models), 1.0)])
