"""A static page that replays a decoded text: what each pass of the model emitted.

Tokens that were drafted and accepted are coloured by their place in the round; the token that the
model itself adds at the end of a round is not. A slider goes through the rounds.
"""

import html
import json
import pathlib
from typing import Any

from experiments.speculative import Settings, corpus_prompts, drafter_name
from inference.drafters.registry import make_drafter
from inference.engine import make_engine
from models.load import Model

PAGE = """<!doctype html><meta charset="utf-8"><title>decode replay</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
pre {{ font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
       background: #fafafa; padding: 1em }}
.prompt {{ color: #777 }} .a {{ background: #fce0c6 }} .b {{ background: #f9c08c }}
.now {{ outline: 1px solid #e8710a }}
input {{ width: 100% }}
</style>
<h1>Decode replay</h1>
<p>{caption}</p>
<p>Shaded: drafted and accepted. Plain: the one token that the model adds itself in every pass.</p>
<input id="at" type="range" min="0" max="{rounds}" value="{rounds}"> <p id="count"></p>
<pre><span class="prompt">{prompt}</span><span id="text"></span></pre>
<script>
const rounds = {data};
const at = document.getElementById("at"), text = document.getElementById("text");
const count = document.getElementById("count");
function draw() {{
  text.textContent = "";
  let tokens = 0;
  for (let i = 0; i < at.value; i++) {{
    rounds[i].forEach((piece, j) => {{
      const span = document.createElement("span");
      span.textContent = piece;
      if (j < rounds[i].length - 1) span.className = i % 2 ? "a" : "b";
      if (i == at.value - 1) span.classList.add("now");
      text.append(span);
      tokens++;
    }});
  }}
  count.textContent = `${{at.value}} passes, ${{tokens}} tokens`;
}}
at.oninput = draw;
draw();
</script>
"""


def rounds_of(
    model: Model, drafter: Any, params: Any, prompt: list[int], new: int
) -> list[list[int]]:
    """The new tokens of a greedy text, by round."""
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    rounds: list[list[int]] = []

    def keep(rows: list[list[int]]) -> None:
        rounds.append(rows[0][sum(map(len, rounds)) :])

    engine.generate([prompt], new, rounds_per_call=1, on_progress=keep)
    return [r for r in rounds if r]


def page(model: Model, name: str, prompt: list[int], rounds: list[list[int]]) -> str:
    """The page for one text."""
    stream = model.tokenizer.stream()
    pieces = [[stream.push([token]) for token in tokens] for tokens in rounds]
    total = sum(map(len, rounds))
    rate = f"{total / len(rounds):.2f} per pass"
    caption = f"{model.name} with {name}: {total} tokens in {len(rounds)} passes, {rate}."
    data = json.dumps(pieces).replace("</", "<\\/")
    return PAGE.format(
        caption=html.escape(caption),
        rounds=len(rounds),
        prompt=html.escape(model.tokenizer.decode(prompt)),
        data=data,
    )


def write(settings: Settings, model: Model, path: pathlib.Path) -> pathlib.Path:
    """Replay the first held-out prompt with the last method of ``settings``; returns the path."""
    method, seed = settings.methods[-1], settings.seeds[0]
    drafter, params = make_drafter(drafter_name(settings, method, seed), model)
    prompt = corpus_prompts(model, "test", 1, settings.prompt_tokens, seed=100 + seed)[0]
    rounds = rounds_of(model, drafter, params, prompt, settings.new_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(model, method, prompt, rounds), encoding="utf-8")
    return path
