"""Draw what the language model wants drawn: text -> voken states -> mapper -> Stable Diffusion, in PyTorch.

    python example.py --language_model ../llm --prompt "a red fox in the snow" --output fox.png

``--language_model`` is a folder of ``minigpt5_jax.export --to transformers``.  The prompt is a caption, as
in stage 1; its image is drawn whether or not the model would have asked for one.
"""

import argparse
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "mapper"))
from torch_mapper import FeatureMapper  # noqa: E402


@torch.no_grad()
def voken_states(folder, prompt, mapper):
    """States [1, vokens, width] that the language model has where it writes the vokens behind a prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    vokens = "".join(f"[IMG{i}]" for i in range(mapper.num_vokens))
    ids = tokenizer(prompt + " " + vokens, return_tensors="pt").input_ids
    states = model(ids, output_hidden_states=True).hidden_states[-1]
    first = ids.shape[1] - mapper.num_vokens - mapper.voken_state_shift
    return states[:, first : first + mapper.num_vokens]


@torch.no_grad()
def draw(pipeline, mapper, states, **options):
    """Images of states [n, vokens, width]; ``options`` are the pipeline's (steps, guidance, latents)."""
    condition, negative = mapper(states), mapper.unconditional()
    return pipeline(
        prompt_embeds=condition.to(pipeline.unet.dtype),
        negative_prompt_embeds=negative.expand_as(condition).to(pipeline.unet.dtype),
        **options,
    ).images


def main():
    """Draws one prompt and writes the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--language_model", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", default="image.png")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(HERE)
    mapper = FeatureMapper.from_folder(HERE / "mapper")
    states = voken_states(options.language_model, options.prompt, mapper)
    [image] = draw(
        pipeline,
        mapper,
        states,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=torch.Generator().manual_seed(options.seed),
    )
    image.save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
