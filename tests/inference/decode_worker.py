"""Compiles decoding for an accelerator that is not here; prints which arrays of a weight's size it writes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import targets

[device, *_] = targets.devices(sys.argv[1])

import jax
import jax.numpy as jnp

from minigpt5_jax.inference.decode import decode
from minigpt5_jax.inference.sampling import SamplingConfig
from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.llama.model import Llama, LlamaConfig

LAYERS, WIDTH, INNER = 3, 512, 1536
sizes = LlamaConfig(
    vocab_size=1000,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
)
dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
template = Template.of(lambda rngs: Llama(sizes, rngs=rngs, **dtypes))
if sys.argv[3:] == ["int8"]:
    template = template.quantize(dict.fromkeys(template.kernels(), "int8"))
place = jax.sharding.SingleDeviceSharding(device)
here = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
params = {path: here(shape.shape, shape.dtype) for path, shape in template.shapes.items()}
if sys.argv[2] == "apart":
    stacked = {path: value for path, value in params.items() if path.startswith("layers/")}
    params |= {path: (here(v.shape[1:], v.dtype),) * LAYERS for path, v in stacked.items()}
greedy = SamplingConfig(max_new_tokens=16, do_sample=False, stop_sequences=(), max_images=1)


def run(params, tokens, lengths, keys):
    llm = template.bind(params)
    answer = decode(llm, llm.embed(tokens), lengths, keys, greedy, first_voken_id=1000, num_vokens=8)
    return answer.tokens


keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
arguments = (params, here((2, 8), jnp.int32), here((2,), jnp.int32), here(keys.shape, keys.dtype))
lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=(sys.argv[1],))
matrices = "|".join(f"{a},{b}" for a in (WIDTH, INNER) for b in (WIDTH, INNER))
result = re.compile(rf"= (bf16\[(?:1,)?(?:{matrices})\]\S*) (?!parameter|get-tuple|bitcast)")
# S(1) is a TPU's own memory, into which a matrix is read; a fusion that is a bitcast writes nothing.
seen = [line for line in lowered.compile().as_text().splitlines() if "calls=%bitcast_fusion" not in line]
written = [found[1] for line in seen if (found := result.search(line)) and "S(1)" not in found[1]]
print(len(written), sorted(set(written)))
