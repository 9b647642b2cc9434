"""What an engine refuses, in one sentence each."""

from collections.abc import Sequence
from typing import Any

Prompts = Sequence[Sequence[int]]


def check_context(prompt: int, new: int, limit: int) -> None:
    """Raise ValueError if prompt and new tokens exceed the context."""
    if prompt + new > limit:
        raise ValueError(
            f"the prompt has {prompt} tokens and {new} new ones are asked for, "
            f"beyond the context of {limit}: shorten the prompt, ask for fewer, or raise "
            "context_limit with a position scheme that extends the model."
        )


def check_reach(policy: Any, length: int, asked: str) -> None:
    """Raise ValueError if a policy's positions end before ``length``, which ``asked`` names."""
    reach = getattr(policy, "max_length", None)
    if reach is not None and length > reach:
        raise ValueError(
            f"{asked} is {length}, and the policy's positions end at {reach} tokens: ask for no "
            "more, or train them for longer texts."
        )


def check_prompts(
    prompts: Prompts,
    max_new_tokens: int,
    seeds: Sequence[int] | None,
    vocab_size: int,
    limit: int,
) -> None:
    """Raise ValueError for prompts that cannot be continued within ``limit`` tokens."""
    if not prompts or max_new_tokens < 0:
        raise ValueError("give at least one prompt and a max_new_tokens of 0 or more.")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one per prompt.")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {i} is empty: start it with at least one token, such as the "
                "start-of-text one."
            )
        _check_ids(prompt, vocab_size, f"prompt {i}")
        check_context(len(prompt), max_new_tokens, limit)


def check_drafts(
    drafter: Any, prompts: Prompts, drafts: Prompts, max_new_tokens: int, vocab_size: int
) -> None:
    """Raise ValueError for draft prompts that the drafter has no use for or that do not fit."""
    limit = getattr(drafter, "draft_limit", None)
    if limit is None:
        raise ValueError(f"{type(drafter).__name__} reads the prompts: leave draft_prompts out.")
    if len(drafts) != len(prompts):
        raise ValueError(
            f"{len(drafts)} draft prompts for {len(prompts)} prompts: give one per prompt."
        )
    for i, (prompt, draft) in enumerate(zip(prompts, drafts, strict=True)):
        if len(draft) == 0 or draft[-1] != prompt[-1]:
            raise ValueError(f"draft prompt {i} must end with the last token of prompt {i}.")
        _check_ids(draft, vocab_size, f"draft prompt {i}")
        check_context(len(draft), max_new_tokens, limit)


def _check_ids(tokens: Sequence[int], vocab_size: int, what: str) -> None:
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise ValueError(
            f"{what} has token ids outside 0..{vocab_size - 1}: the tokenizer is not this model's."
        )
