"""A static page that replays a decoded text: what every pass of the model was offered and kept.

A slider goes through the passes. The text shows in colour which tokens were drafted; below it
stands the draft of the chosen pass as a tree, the accepted branch marked, the rest struck out.
"""

import html
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from experiments.speculative import Settings, drafter_name, heldout_prompts
from inference.drafter import Draft
from inference.drafters.registry import make_drafter
from inference.engine import make_engine
from inference.loop import State, decode_round, propose
from models import decoder
from models.load import Model
from ops.sampling import SamplingParams

PAGE = """<!doctype html><meta charset="utf-8"><title>decode replay</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
pre {{ font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap;
       background: #fafafa; padding: 1em }}
.prompt {{ color: #777 }} .a {{ background: #fce0c6 }} .b {{ background: #f9c08c }}
.now {{ outline: 1px solid #e8710a }}
input {{ width: 100% }}
#draft ul {{ margin: 0; padding-left: 1.4em; list-style: none; border-left: 1px solid #ddd }}
#draft span {{ font: 13px/1.5 ui-monospace, monospace; white-space: pre; color: #888;
               text-decoration: line-through }}
#draft span.kept {{ color: black; background: #f9c08c; text-decoration: none }}
</style>
<h1>Decode replay</h1>
<p>{caption}</p>
<p>Shaded: drafted and accepted. Plain: the one token that the model adds itself in every pass.</p>
<input id="at" type="range" min="0" max="{passes}" value="{passes}"> <p id="count"></p>
<pre><span class="prompt">{prompt}</span><span id="text"></span></pre>
<h2>The draft of this pass</h2>
<div id="draft"></div>
<script>
const passes = {data};
const at = document.getElementById("at"), text = document.getElementById("text");
const count = document.getElementById("count"), draft = document.getElementById("draft");
function tree(nodes, parent) {{
  const list = document.createElement("ul");
  nodes.forEach((node, i) => {{
    if (node.parent != parent) return;
    const item = document.createElement("li"), span = document.createElement("span");
    span.textContent = JSON.stringify(node.text).slice(1, -1) || "\\u2423";
    if (node.kept) span.className = "kept";
    item.append(span, tree(nodes, i));
    list.append(item);
  }});
  return list;
}}
function draw() {{
  text.textContent = "";
  draft.textContent = "";
  let tokens = 0;
  for (let i = 0; i < at.value; i++) {{
    passes[i].text.forEach((piece, j) => {{
      const span = document.createElement("span");
      span.textContent = piece;
      if (j < passes[i].text.length - 1) span.className = i % 2 ? "a" : "b";
      if (i == at.value - 1) span.classList.add("now");
      text.append(span);
      tokens++;
    }});
  }}
  count.textContent = `${{at.value}} passes, ${{tokens}} tokens`;
  if (at.value > 0) draft.append(tree(passes[at.value - 1].draft, 0));
}}
at.oninput = draw;
draw();
</script>
"""


@struct.dataclass
class Pass:
    """What one pass was offered (tokens and parents of the valid nodes) and what it emitted."""

    tokens: Any
    parent: Any
    emitted: Any


def passes_of(
    model: Model,
    drafter: Any,
    params: Any,
    prompt: list[int],
    new: int,
    drafter_state: Any = None,
) -> list[Pass]:
    """Every pass of a greedy text. Each drafts twice: once to be shown, once in the real round."""
    greedy = SamplingParams.make()
    engine = make_engine(model.params, model.cfg, drafter=drafter, drafter_params=params)
    state, seeds = engine.start([prompt], new, greedy, drafter_state=drafter_state)
    policy = decoder.default_policy(model.cfg)
    eos = jnp.asarray(model.tokenizer.end_ids, jnp.int32)

    @jax.jit
    def one(weights: Any, params: Any, state: State) -> tuple[Draft, State]:
        draft, _, _ = propose(weights, model.cfg, drafter, params, state, seeds, greedy, None)
        return draft, decode_round(
            weights, model.cfg, policy, drafter, params, state, seeds, greedy, eos, None, "greedy"
        )

    passes = []
    while not state.done.all():
        before = int(state.length[0])
        draft, state = one(engine.params, params, state)
        valid = np.asarray(draft.valid[0])
        number = np.cumsum(valid) - 1  # a node's place among the valid ones
        parent = np.asarray(draft.parent[0])[valid]
        passes.append(
            Pass(
                tokens=np.asarray(draft.tokens[0])[valid],
                parent=np.where(parent < 0, -1, number[np.maximum(parent, 0)]),
                emitted=np.asarray(state.tokens[0, before : int(state.length[0])]),
            )
        )
    return passes


def kept_nodes(one: Pass) -> set[int]:
    """The nodes of the draft on the branch that the emitted text follows, the root among them."""
    kept, at = {0}, 0
    for token in one.emitted[:-1].tolist():
        children = np.flatnonzero((one.parent == at) & (one.tokens == token))
        at = int(children[0])
        kept.add(at)
    return kept


def page(model: Model, name: str, prompt: list[int], passes: list[Pass]) -> str:
    """The page for one text."""
    stream = model.tokenizer.stream()
    stream.push(prompt)  # how a piece is written may depend on what stands before it
    data = []
    for one in passes:
        kept = kept_nodes(one)
        nodes = [
            {"text": model.tokenizer.decode([token]), "parent": parent, "kept": i in kept}
            for i, (token, parent) in enumerate(
                zip(one.tokens.tolist(), one.parent.tolist(), strict=True)
            )
        ]
        data.append({"text": [stream.push([t]) for t in one.emitted.tolist()], "draft": nodes})
    total = sum(len(one.emitted) for one in passes)
    rate = f"{total / len(passes):.2f} per pass"
    caption = f"{model.name} with {name}: {total} tokens in {len(passes)} passes, {rate}."
    return PAGE.format(
        caption=html.escape(caption),
        passes=len(passes),
        prompt=html.escape(model.tokenizer.decode(prompt)),
        data=json.dumps(data).replace("</", "<\\/"),
    )


def write(settings: Settings, model: Model, path: pathlib.Path) -> pathlib.Path:
    """Replay the first held-out prompt with the last method of ``settings``; returns the path."""
    method, seed = settings.methods[-1], settings.seeds[0]
    drafter, params = make_drafter(drafter_name(settings, method, seed), model)
    prompt = heldout_prompts(settings, model, seed)[0]
    passes = passes_of(model, drafter, params, prompt, settings.new_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(model, method, prompt, passes), encoding="utf-8")
    return path
