"""Exports of models that were trained here: a run of two updates, and a LoRA run that stands on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from minigpt5_jax.export import export_torch
from minigpt5_jax.shapes.files import ASSETS, read_config
from minigpt5_jax.wiring.restore import load_run

WORKER = Path(__file__).parents[1] / "training" / "stage2_worker.py"


@pytest.mark.slow
def test_two_stages_trained_here(tmp_path, hidden_of):
    """``two`` has LoRA, and the mapper's MLP and queries of ``one``, which is named ``gone`` by now."""
    done = subprocess.run([sys.executable, WORKER, tmp_path], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "DONE" in done.stdout, done.stderr
    first, second = load_run(tmp_path / "gone"), load_run(tmp_path / "two")

    export_torch(tmp_path / "gone", tmp_path / "1.ckpt", to="minigpt5")
    export_torch(tmp_path / "two", tmp_path / "2.ckpt", to="minigpt5")
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2))
    llama = read_config(ASSETS, "llama")
    lora = llama.num_hidden_layers * 2 * 2  # layers, projections, factors
    assert len(two) == len(one) - len([k for k in one if k.startswith(("fc.", "t2i_"))]) + lora
    assert np.array_equal(one["t2i_decoder_prompt"][0], second.params["mapper/queries"]), "inherited"
    word = "model.llama_model.base_model.model.lm_head.modules_to_save.default.weight"
    assert np.array_equal(two[word][-9:], second.params["backbone/llm/lm_head/voken"])
    assert not np.array_equal(two[word][-9:], first.params["backbone/llm/lm_head/voken"]), "trained since"

    export_torch(tmp_path / "two", tmp_path / "llm", to="transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = [1, 261, 424, 443, *range(llama.vocab_size, llama.vocab_size + 8), 269]
    states, logits = hidden_of(second, ids)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    np.testing.assert_allclose(theirs.logits[0], logits, atol=1e-4 * np.abs(logits).max())
    np.testing.assert_allclose(theirs.hidden_states[-1][0], states, atol=1e-4 * np.abs(states).max())
