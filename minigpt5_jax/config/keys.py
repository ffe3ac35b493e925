"""The table of configuration keys that every model has: name, default and one line why.

Those of its parts (``model.backbone.*``, ``weights.*``) stand in the parts' files.  Q-numbers are quirks of
the original; other numbers in brackets are sections: docs/fidelity.md has both.
"""

from __future__ import annotations

from typing import Any

from minigpt5_jax.parts.contracts import Key


def unset(kind: type, why: str, **rules: Any) -> Key:
    """A key that is not set by default."""
    return Key(None, why, kind=kind, **rules)


def path(why: str) -> Key:
    """A key that is a path, not set by default; ``~`` in it is replaced where a configuration enters."""
    return unset(str, why, path=True)


KEYS: dict[str, Key] = {
    # -- run ------------------------------------------------------------------------------------
    "run.name": Key("run", "name in logs and pages"),
    "run.workdir": path("folder of metrics, images and checkpoints; the --workdir flag sets it"),
    "run.seed": Key(42, "weights that start from nothing, data order and draws (the original's seed)", low=0),
    "run.num_steps": unset(int, "updates; not set: run.epochs over the training data", low=1),
    "run.epochs": Key(2.0, "passes over the training data where run.num_steps is not set", low=0.0),
    "run.log_every": Key(10, "steps between lines in metrics.jsonl and TensorBoard", low=1),
    "run.eval_every": Key(1000, "steps between validations, and at the end; 0 for never", low=0),
    "run.eval_batches": Key(
        8, "batches of a validation, of data.global_batch samples and the same ones every time", low=1
    ),
    "run.save_every": Key(1000, "steps between checkpoints; the last step is always saved", low=1),
    "run.grid_every": Key(1000, "steps between image grids; 0 for never", low=0),
    "run.grid_images": Key(8, "held-out captions in a grid", low=1),
    "run.keep_latest": Key(2, "newest checkpoints kept", low=1),
    "run.keep_best": Key(1, "best checkpoints kept besides the newest", low=0),
    "run.best_metric": Key("image", "validation metric that decides the best checkpoint; the lowest wins"),
    "run.tracker": Key(
        "none", "also takes metrics and images: wandb, or a module with open_tracker(name, workdir, config)"
    ),
    "run.init_from": path("checkpoint folder whose trained parameters this run starts from (stage 2)"),
    "run.resume": Key(True, "continue from the newest checkpoint in the workdir, if there is one"),
    "run.compile_cache": Key(
        "~/.cache/minigpt5_jax/xla", "folder of compiled programs, so that a restart is quick; '' for none"
    ),
    "run.join_timeout": Key(300, "seconds that processes wait for each other when a run starts", low=1),
    "run.silence_timeout": Key(
        60, "seconds after which a silent process makes the others stop; 0 for never", low=0
    ),
    "run.stall_timeout": Key(
        600, "seconds after which a process that stays behind makes the others stop; 0 for never", low=0
    ),
    # -- data -----------------------------------------------------------------------------------
    "data.format": Key(
        "cc3m",
        "reader: published data sets, your own JSONL, what `prepare` wrote, or the small world, drawn "
        "into the workdir in the files of CC3M, VIST (stories) or MMDialog (dialogs)",
        choices=(
            "cc3m",
            "cc3m_tar",
            "parquet",
            "vist",
            "mmdialog",
            "jsonl",
            "prepared",
            "shapes",
            "shapes_stories",
            "shapes_dialogs",
        ),
    ),
    "data.train": path("training data: .tsv, .json, .jsonl, or a folder of tar shards or of `prepare`"),
    "data.validation": path("held-out data, same format"),
    "data.train_mapping": path(
        "VIST's image paths; not set: the file's name with image_mapping for cleaned (Q29)"
    ),
    "data.validation_mapping": path("the same for data.validation"),
    "data.image_root": path("folder that image paths are relative to; not set: the file's own folder"),
    "data.allow_outside_images": Key(
        False, "image paths may lead out of data.image_root (absolute ones, ..), to any file of the machine"
    ),
    "data.global_batch": Key(48, "samples per update over all devices (paper, stage 1)", low=1),
    "data.accumulation": unset(
        int,
        "micro-batches per update, which equals the large batch's; not set: as few as fit the devices",
        low=1,
    ),
    "data.worker_count": Key(4, "reader processes; 0 reads in the main one", low=0),
    "data.prefetch": Key(2, "batches each reader holds ready", low=1),
    "data.buckets": Key(
        (), "lengths of rows, ascending to data.max_length: a batch takes samples of one; () pads all to it"
    ),
    "data.packing": Key(
        "shuffled",
        "a row is a whole story, its samples one tree, computed once where they are alike; or shuffled "
        "samples as in the original, several where that suits; or one sample",
        choices=("tree", "shuffled", "off"),
    ),
    "data.pack": Key(
        0,
        "shuffled samples of a row, each a segment of its own; 0: up to 4 captions where data.buckets are "
        "set, else 1",
        low=0,
    ),
    "data.split_vokens": Key(
        True, "captions, on which nothing trainable acts, run without gradients: same result, less work"
    ),
    "data.index_cache": Key(
        "~/.cache/minigpt5_jax/lengths", "folder of sample lengths, which buckets and packing plan from"
    ),
    "data.max_length": Key(
        256, "positions of a row, images included; longer ones follow data.truncation", low=16
    ),
    "data.max_images": Key(0, "input images of a row at most; 0 for text-only input (CC3M)", low=0),
    "data.max_targets": Key(8, "target positions of a row at most", low=3),
    "data.truncation": Key(
        "left_history",
        "what is cut: old history, so that the instruction stays, or the end (Q23)",
        choices=("left_history", "right"),
    ),
    "data.bos_id": Key(1, "id in front of each sample; 2 for weights released in October 2023 (Q21)", low=0),
    "data.prompt_set": Key(
        "head", "prompt spelling: newest code or October 2023 release (Q26)", choices=("head", "release")
    ),
    "data.tasks": Key((), "VIST's tasks, of gen, multimodal, understanding; () for all three (5.3)"),
    "data.context_dropout": Key(
        0.0,
        "share of VIST's samples that read only texts or only images of the steps before; the original: 0",
        low=0.0,
        high=1.0,
    ),
    "data.dialog_loader": Key(
        "head",
        "MMDialog's rules: newest code or October 2023 release (5.4)",
        choices=("head", "release"),
    ),
    "data.bad_media_ids": Key(
        ("-3872362534310063124", "3713630103994725971"), "MMDialog's images that end a conversation (Q28)"
    ),
    "data.features": path(
        "folder of features of images, by `prepare features` or data.cache; not set: features/ in the workdir"
    ),
    "data.cache": Key(
        "off",
        "on: the first epoch writes features of its images for the later ones; off: each step encodes its "
        "images, where data.features names none",
        choices=("on", "off"),
    ),
    "data.instruction_every": Key(
        100, "every n-th CC3M row gives an instruction sample too; 0 none (5.2)", low=0
    ),
    "data.resample_prompts": Key(True, "draw prompt wording per epoch, not once for the run (Q24)"),
    "data.mask_all_inner_vokens": Key(False, "mask [IMG7] in the text loss too; the original does not (Q1)"),
    "data.flip_mode": Key(
        "independent",
        "horizontal flips, p=0.5, input and output apart as in the original (Q17)",
        choices=("independent", "shared", "off"),
    ),
    "data.flip_each_epoch": Key(
        False, "mirrors drawn again in each epoch, as in the original, not once for each image (Q17)"
    ),
    "data.images_as_shown": Key(
        True, "images turned by EXIF, transparent ones on white; the original drops both (5.5)"
    ),
    "data.pad_input_square": Key(False, "letterbox input images white before the crop (Q30)"),
    "data.strict_image_count": Key(True, "as many placeholders as images, or the sample is skipped (Q31)"),
    "data.error_budget": Key(
        0.01,
        "unusable samples after which training stops, a share below 1 or a count; each is logged and counted",
        low=0.0,
    ),
    "data.shapes_train": Key(4096, "training scenes, stories or dialogues that format=shapes* draws", low=1),
    "data.shapes_validation": Key(64, "held-out ones", low=1),
    "data.shapes_max_objects": Key(1, "objects of a scene at most, of format=shapes", low=1, high=3),
    "data.shapes_wishes": Key(
        0.0,
        "share of training dialogues of format=shapes_dialogs whose first request leaves attributes open",
        low=0.0,
        high=1.0,
    ),
    # -- model ----------------------------------------------------------------------------------
    "model.dtype": Key(
        "bfloat16",
        "compute dtype of the towers; losses and trainables are fp32 (1.13)",
        choices=("float32", "bfloat16"),
    ),
    "model.param_dtype": Key("bfloat16", "dtype frozen weights are held in", choices=("float32", "bfloat16")),
    "model.attention": Key(
        "auto",
        "how towers attend; auto: cudnn on NVIDIA GPUs, splash on TPUs, else blockwise",
        choices=("auto", "cudnn", "splash", "blockwise", "plain"),
    ),
    "model.remat": Key(
        "auto",
        "layers computed again in the backward pass, for memory; auto: as few as the device's memory allows",
        choices=("auto", "none", "backbone", "generator", "all"),
    ),
    # -- loss -----------------------------------------------------------------------------------
    "loss.text": Key(0.01, "weight of the text cross-entropy; 0 leaves it out (3.1)", low=0.0),
    "loss.image": Key(1.0, "weight of the latent-diffusion loss; 0 leaves it out", low=0.0),
    "loss.caption": Key(0.1, "weight of the caption-feature loss; 0 leaves it out (stage 2)", low=0.0),
    "loss.cfg_dropout": Key(
        0.1, "probability that an item's voken states are zeroed (3.2)", low=0.0, high=1.0
    ),
    "loss.min_snr_gamma": Key(5.0, "gamma of the min-SNR weighting; 0 for the plain mean (Q13)", low=0.0),
    "loss.caption_target_on_drop": Key(
        "empty",
        "caption target of a dropped item: the empty string's features, or none (Q8)",
        choices=("empty", "skip"),
    ),
    "loss.caption_attn_mask": Key(True, "caption targets attend to real tokens only (Q10)"),
    # -- optimizer ------------------------------------------------------------------------------
    "optimizer.lr_llm": Key(2e-5, "peak rate of voken rows (and LoRA); AdamW (4.1)", low=0.0),
    "optimizer.lr_mapper": Key(2e-4, "peak rate of the mapper: ten times that in stage 1 (Q14)", low=0.0),
    "optimizer.warmup_steps": Key(
        1000, "linear warm-up, then linear to 0 at the last step; a run not longer: a tenth of it", low=0
    ),
    "optimizer.b1": Key(0.9, "AdamW first moment", low=0.0, high=1.0),
    "optimizer.b2": Key(0.999, "AdamW second moment", low=0.0, high=1.0),
    "optimizer.eps": Key(1e-8, "AdamW epsilon", low=0.0),
    "optimizer.weight_decay": Key(0.01, "decoupled decay of every trained leaf (torch's default)", low=0.0),
    "optimizer.decay_frozen_rows": Key(
        False,
        "weight decay shrinks the language model's frozen rows too, as in the original (Q3)",
    ),
    "optimizer.grad_clip": unset(
        float, "global norm over the trainables; not set: no clipping (Q19)", low=0.0
    ),
    # -- tuning ---------------------------------------------------------------------------------
    "tuning.stage": Key(
        "stage1", "which parameters of the parts train, and how fast (4.2)", choices=("stage1", "stage2")
    ),
    "tuning.rules": Key(
        (), "ordered (path pattern, group) before those of the parts; the first match decides (4.2)"
    ),
    # -- mesh -----------------------------------------------------------------------------------
    "mesh.data": Key(-1, "devices over samples; -1 takes what is left", low=-1),
    "mesh.fsdp": Key(1, "devices over samples that frozen towers may be spread over (mesh.frozen)", low=-1),
    "mesh.tensor": unset(
        int,
        "devices the language model's heads and MLP are split over; not set: as few as memory allows",
        low=-1,
    ),
    "mesh.frozen": Key(
        "tensor",
        "how frozen towers lie; tensor: the language model split over mesh.tensor, the others whole on each "
        "device; replicated: all whole; fsdp: all spread over mesh.fsdp besides, gathered in each pass",
        choices=("tensor", "replicated", "fsdp"),
    ),
    "mesh.exchange": Key(
        "model",
        "dtype in which trained matrices and their gradients travel between devices: model.dtype, or float32",
        choices=("model", "float32"),
    ),
    # -- inference ------------------------------------------------------------------------------
    "inference.sampler": Key(
        "pndm",
        "image sampler, one of the generator's: the original's PNDM, or one with fewer calls (Q40)",
    ),
    "inference.num_inference_steps": Key(50, "denoising steps; PNDM makes one call more", low=1),
    "inference.guidance_scale": Key(7.5, "classifier-free guidance; 1 switches it off (3.5)", low=0.0),
    "inference.cfg_negative": Key(
        "voken_zero",
        "negative condition: T(0) or the empty prompt (Q38)",
        choices=("voken_zero", "empty_prompt"),
    ),
    "inference.do_sample": Key(True, "draw tokens; False takes the most likely one"),
    "inference.temperature": Key(1.0, "of the token distribution", low=0.01),
    "inference.top_k": Key(50, "tokens kept, the original's implicit value; 0 for all (Q32)", low=0),
    "inference.top_p": Key(0.9, "probability mass kept, after top_k", low=0.0, high=1.0),
    "inference.repetition_penalty": Key(2.0, "over generated tokens, not the prompt (6.2)", low=0.01),
    "inference.max_new_tokens": Key(256, "tokens at most; room for one image is kept", low=1),
    "inference.eos_ids": Key((2,), "ids that end a text besides ###; the original: (1,) (Q34)"),
    "inference.force_image": Key(
        "off",
        "make an image certain: at once, or after the text (Q35)",
        choices=("off", "first", "after_text"),
    ),
    "inference.ban_inner_vokens": Key(True, "never write [IMG1]... into a text; the original may (Q1)"),
    "inference.dummy_token_id": unset(
        int, "first id that is penalised and never read; not set: none, the original: 0 (Q33)", low=0
    ),
    "inference.max_images": Key(1, "images drawn per answer (Q36)", low=0),
    "inference.layers": Key(
        "auto",
        "how a session keeps the language model's layers: stacked compile sooner, apart are decoded with no "
        "copy of their matrices; auto: apart on accelerators",
        choices=("auto", "stacked", "apart"),
    ),
    "inference.quantization": Key(
        "as_trained",
        "how a trained run is opened: frozen towers held as it trained with them, all as model.param_dtype "
        "(none), those that may be in 8 bits, or the language model in 4.5 (nf4)",
        choices=("as_trained", "none", "int8", "nf4"),
    ),
}

DEFAULT_PARTS = {"backbone": "minigpt4", "mapper": "encoder_decoder", "generator": "stable_diffusion"}
"""Kind of part -> the one that a configuration starts with."""

FORMER_KEYS = (
    "data.tokenizer_mode",
    "data.feature_input_range",
    "model.noise_dtype",
    "model.voken_state_shift",
    "loss.cfg_drop_in_eval",
    "loss.deterministic_eval",
    "inference.emit_dummy_token",
)
"""Keys of earlier versions that had one legal value (docs/fidelity.md); checkpoints may still have them."""

RENAMED_KEYS = {"run.grid_pictures": "run.grid_images"}
"""Name of a key in earlier checkpoints -> its name now."""
