"""Memory of a 7B language model's gradient, compiled for a v5e chip, by how its kernels are held.

    python -m benchmarks.quantization --method int8              # none, int8, nf4
    python -m benchmarks.quantization --method nf4 --layers 8

Needs libtpu (``pip install libtpu``), no TPU: nothing is run or allocated.  One row of 32 tokens, gradient of
the voken rows, bfloat16.  Prints a JSON line: bytes of arguments and of temporaries.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp

from minigpt5_jax.models.abstract import Template
from minigpt5_jax.models.llama.model import Llama, LlamaConfig
from minigpt5_jax.planning.step import compile_for
from minigpt5_jax.planning.topology import open_topology


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("none", "int8", "nf4"), default="int8")
    parser.add_argument("--layers", type=int, default=32)
    print(json.dumps(measure(**vars(parser.parse_args()))))


def measure(method: str, layers: int) -> dict[str, object]:
    """Bytes of arguments and temporaries of the compiled pass."""
    topology = open_topology("v5e:1x1")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    sizes = LlamaConfig(num_hidden_layers=layers)
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    template = Template.of(lambda rngs: Llama(sizes, rngs=rngs, **dtypes), attention="plain")
    if method != "none":
        template = template.quantize(dict.fromkeys(template.kernels(), method))
    here = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    shapes = {path: here(shape) for path, shape in template.shapes.items()}
    trainable = {path: shape for path, shape in shapes.items() if path.endswith("/voken")}
    frozen = {path: shape for path, shape in shapes.items() if path not in trainable}

    def loss(trainable: dict, frozen: dict, tokens: jax.Array) -> jax.Array:
        model = template.bind({**frozen, **trainable})
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        states = model(model.embed(tokens), positions=positions, segment_ids=jnp.ones_like(tokens))
        return jnp.square(states).mean()

    tokens = here(jax.ShapeDtypeStruct((1, 32), jnp.int32))
    compiled = compile_for(topology, jax.jit(jax.grad(loss)), trainable, frozen, tokens)
    told = {"method": method, "layers": layers, "needed": compiled.needed}
    if compiled.memory is not None:
        told |= {"arguments": compiled.memory.arguments, "temporaries": compiled.memory.temporary}
    return told


if __name__ == "__main__":
    main()
