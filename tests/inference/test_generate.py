import numpy as np
import pytest

from inference import generate
from inference.engine import make_engine
from models.load import load
from tests.inference.models import config, letters, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("generate") / "model"
    save_model(path, config(), letters())
    return str(path)


def command(*flags: str) -> int:
    return generate.main(["generate", *flags])


def test_it_prints_the_greedy_continuation(folder, capsys):
    assert command(f"--model={folder}", "--prompt=abcab", "--max_new_tokens=12") == 0
    model = load(folder)
    eng = make_engine(model.params, model.cfg)
    assert model.tokenizer.eos_id is not None
    eos = [model.tokenizer.eos_id]
    ids = eng.generate([model.tokenizer.encode("abcab")], 12, eos=eos).tokens[0]
    want = model.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(want) > 3 and capsys.readouterr().out == want + "\n"


@pytest.mark.parametrize("drafter", ["lookup", "recycling", "draft"])
def test_text_is_the_same_with_every_drafter(folder, capsys, drafter):
    own = f"draft:{folder}" if drafter == "draft" else drafter
    flags = [f"--model={folder}", "--prompt=abcab", "--max_new_tokens=12"]
    assert command(*flags) == 0
    plain = capsys.readouterr()
    assert command(*flags, f"--drafter={own}", "--stats") == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    assert "target passes" in drafted.err and not plain.err


def test_text_arrives_in_pieces_that_join_to_the_whole(folder):
    model, pieces = load(folder), []
    prompt = model.tokenizer.encode("abcab")
    eng = make_engine(model.params, model.cfg)
    sampling = generate.SamplingParams.make()
    generation, first, rate = generate.stream(
        eng, model.tokenizer, prompt, 12, sampling, 0, pieces.append
    )
    want = model.tokenizer.decode(generation.tokens[0], skip_special_tokens=True)
    assert "".join(pieces) == want
    assert sum(bool(piece) for piece in pieces) >= 2
    assert first > 0 and rate > 0
    assert f"{len(generation.tokens[0])} tokens in" in generate.report(generation, first, rate)
    assert generate.report(generation, 1.0, 2.5).endswith("included), then 2.5 tokens per second.")
    assert generate.report(generation, 1.0, 0.0).endswith("included), which were all.")


def test_the_seed_decides_sampled_text(folder, capsys):
    flags = [f"--model={folder}", "--prompt=abcab", "--max_new_tokens=12", "--temperature=1.5"]
    texts = []
    for seed in (1, 1, 2):
        assert command(*flags, f"--seed={seed}") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_may_come_from_a_file(folder, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("abcab", encoding="utf-8")
    flags = [f"--model={folder}", "--max_new_tokens=6"]
    assert command(*flags, "--prompt=abcab") == 0
    assert command(*flags, f"--prompt_file={tmp_path / 'prompt.txt'}") == 0
    direct, from_file = capsys.readouterr().out.splitlines()
    assert direct == from_file


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt="], "the prompt is empty"),
        ([], "exactly one of --prompt and --prompt_file"),
        (["--prompt=a", "--prompt_file=b"], "exactly one of --prompt and --prompt_file"),
        (["--prompt_file=/nowhere"], "no file /nowhere"),
        (["--prompt=" + "a" * 200], "200 tokens and 128 new ones are asked for"),
        (["--prompt=a", "--max_new_tokens=-1"], "max_new_tokens of 0 or more"),
        (["--prompt=a", "--temperature=-0.5"], "temperature must be 0"),
        (["--prompt=a", "--temperature=nan"], "temperature must be 0"),
        (["--prompt=a", "--top_p=0"], "top_p must lie above 0"),
        (["--prompt=a", "--top_k=-1"], "top_k must be a whole number"),
        (["--prompt=a", "--seed=-1"], "--seed"),
        (["--prompt=a", "--drafter=magic"], "unknown drafter 'magic'"),
        (["--prompt=a", "--chat"], "no chat template"),
        (["--prompt=a", "--max_tokens=3"], "max_tokens"),
        (["--prompt=a", "b"], "unexpected argument 'b'"),
    ],
)
def test_bad_flags_end_with_one_sentence(folder, capsys, flags, message):
    assert command(f"--model={folder}", *flags) == 2
    streams = capsys.readouterr()
    assert not streams.out
    assert streams.err.startswith("error: ") and message in streams.err
    assert len(streams.err.splitlines()) == 1


def test_an_unknown_model_is_refused_before_anything_is_read(capsys):
    assert command("--prompt=a") == 2
    assert "--model is missing" in capsys.readouterr().err
    assert command("--model=gpt-9", "--prompt=a") == 2
    assert "no model 'gpt-9'" in capsys.readouterr().err


def test_help_lists_the_flags(capsys):
    assert command("--help") == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("model", "drafter", "top_p", "max_new_tokens"))
    assert np.all([word in text for word in ("recycling", "draft:DIR")])
