"""The grammar of a micro-turn holds for any weights; the gate follows its threshold, sampling follows probabilities."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtml.config import Config
from jaxtml.model.duplex.grammar import decide_gate
from jaxtml.stream.tokens import Control
from tests.model.duplex.running import SLOTS, active_micro_turns, assert_same, run_sessions, two_layers


def parse(tokens: list[int], base: int) -> tuple[list[int] | None, list[int] | None, int]:
    """Returns the heard tokens, the said tokens (None where the part is absent) and the gate of one micro-turn."""
    heard = said = None
    rest = list(tokens)
    if rest[0] == base + Control.HEARD:
        rest.pop(0)
        heard = []
        while rest[0] < base:
            heard.append(rest.pop(0))
    if rest[0] == base + Control.SAY:
        rest.pop(0)
        said = []
        while rest[0] < base or rest[0] in (base + Control.DELEGATE, base + Control.END):
            said.append(rest.pop(0))
    (gate,) = rest
    return heard, said, gate - base


def test_the_grammar_and_the_limits_of_a_micro_turn_hold_for_any_weights(engine, mixed):
    c = engine.config.duplex
    parts = []
    for slot in range(SLOTS):
        for _, out in active_micro_turns(mixed, slot):
            heard, said, gate = parse(out.tokens[: out.count].tolist(), c.control_base)
            assert gate == (Control.SPEAK if out.speaking else Control.LISTEN)
            assert len(heard or []) <= c.max_heard and len(said or []) <= c.max_text
            assert not out.tokens[out.count :].any()
            assert out.speaking == (out.p_speak > c.gate_threshold)
            parts.append((heard, said))
    assert max(len(heard or []) for heard, _ in parts) == c.max_heard
    assert max(len(said or []) for _, said in parts) == c.max_text
    assert any(heard is None for heard, _ in parts) and any(said is None for _, said in parts)


def test_the_token_says_when_the_gate_is_decided_and_the_probability_says_how(small):
    config = dataclasses.replace(small.duplex, gate_threshold=0.3)
    base = config.control_base
    listen, speak = base + Control.LISTEN, base + Control.SPEAK
    token = jnp.array([listen, listen, speak, speak, 7, 7])
    p_speak = jnp.array([0.29, 0.31, 0.29, 0.31, 0.29, 0.31], jnp.float32)
    assert decide_gate(config, token, p_speak).tolist() == [listen, speak, listen, speak, 7, 7]


@pytest.mark.parametrize(("threshold", "flow_steps"), [(0.0, 1), (1.0, 3)])
def test_a_gate_threshold_of_0_always_speaks_and_of_1_never_does(small, threshold, flow_steps):
    run = run_sessions(two_layers(small, flow_steps, gate_threshold=threshold, heard=False), 12)
    base = small.duplex.control_base
    for slot in range(2):
        for _, out in active_micro_turns(run, slot):
            assert out.speaking == (threshold == 0.0)
            assert bool(out.wave.any()) == (threshold == 0.0)
            assert base + Control.HEARD not in out.tokens[: out.count], "a config without `heard` transcribes nothing"


def allowed_after(tokens: list[int], config: Config) -> np.ndarray:
    """Returns `[V]` bool: what may follow these tokens of a micro-turn."""
    c = config.duplex
    base = c.control_base
    mask = np.zeros(config.backbone.vocab_size, bool)
    mask[[base + Control.LISTEN, base + Control.SPEAK]] = True
    said = base + Control.SAY in tokens
    opened = tokens.index(base + Control.SAY) if said else 0
    if not said:
        mask[base + Control.SAY] = True
        if not tokens:
            mask[base + Control.HEARD] = True
        elif len(tokens) - 1 < c.max_heard:
            mask[:base] = True
    elif len(tokens) - 1 - opened < c.max_text:
        mask[:base] = True
        mask[[base + Control.DELEGATE, base + Control.END]] = True
    return mask


def test_sampling_stays_inside_the_nucleus_and_follows_its_probabilities(small):
    config = two_layers(small, flow_steps=4, temperature=0.7, top_p=0.8)
    base = config.duplex.control_base
    run = run_sessions(config, 100)
    expected_gates, variance, gates_met, greedy = 0.0, 0.0, 0, 0
    for slot in range(2):
        for _, out in active_micro_turns(run, slot):
            tokens = out.tokens[: out.count].tolist()
            for i, token in enumerate(tokens):
                logits = np.where(allowed_after(tokens[:i], config), out.logits[i], -np.inf).astype(np.float64) / 0.7
                probability = np.exp(logits - logits.max())
                probability /= probability.sum()
                order = np.argsort(-probability)
                nucleus = order[np.cumsum(probability[order]) - probability[order] < 0.8 + 1e-6]
                gates = [base + Control.LISTEN, base + Control.SPEAK]
                assert token in nucleus or (token in gates and set(gates) & set(nucleus))
                gate = probability[[g for g in gates if g in nucleus]].sum() / probability[nucleus].sum()
                expected_gates, variance = expected_gates + gate, variance + gate * (1 - gate)
                gates_met += token in gates
                greedy += token == order[0]
    assert greedy < 0.9 * sum(out.count.sum() for out in run.outputs)
    assert abs(gates_met - expected_gates) < 4 * variance**0.5, f"{gates_met} gates, {expected_gates:.1f} expected"


def test_sampling_differs_from_seed_to_seed_and_repeats_with_one_seed(small):
    config = two_layers(small, flow_steps=4, temperature=0.7, top_p=0.8)
    first, again, other = (run_sessions(config, 10, seed=seed) for seed in (0, 0, 1))
    assert_same(first.outputs, again.outputs, exact=True)
    assert any((a.tokens != b.tokens).any() for a, b in zip(first.outputs, other.outputs, strict=True))
