"""What the tests of data sets share: a check of one sample against numbers written out by hand."""

from __future__ import annotations

import pytest

from minigpt5_jax.data.text.templates import IGNORE, expand
from minigpt5_jax.data.text.tokenizer import LlamaTokenizer

IMAGE_ID = 1008  # of the tiny tokenizer


@pytest.fixture(scope="session")
def check_golden(oracle_dir):
    """``check(example, source, target, source_ids, target_ids, labels, voken)``.

    ``source_ids`` has 1008 once for each image, ``labels`` are those of the target, and ``voken`` is the
    position of ``[IMG0]`` with BOS at 0 and images 32 positions wide, or None.
    """
    tokenizer = LlamaTokenizer(oracle_dir / "tokenizer_llama" / "tokenizer.model")

    def check(example, source, target, source_ids, target_ids, labels, voken):
        assert (example.source, example.target) == (source, target)
        places = [n for n, i in enumerate(source_ids) if i == IMAGE_ID]
        assert len(example.images) == len(places)
        assert (example.target_image is None) == (voken is None)
        got = expand(tokenizer, example.source, example.target, image_tokens=32, max_length=2048)
        wide = [j for i in source_ids for j in [i] * (32 if i == IMAGE_ID else 1)]
        assert got.tokens.tolist() == [1, *wide, *target_ids]
        assert got.labels.tolist() == [IGNORE] * (1 + len(wide)) + labels
        assert got.image_start == tuple(1 + n + 31 * before for before, n in enumerate(places))
        assert (got.voken_start, got.dropped) == (voken, 0)
        if voken is not None:  # the mapper reads the states that predict the vokens (fidelity 2.4)
            assert got.tokens[voken - 1 : voken + 7].tolist()[1:] == list(range(1000, 1007))

    return check
