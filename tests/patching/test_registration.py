"""`import ras_fast` is enough for `attn_implementation="ras_fast"`, and does not import transformers."""

import subprocess
import sys

import pytest
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ras_fast.patching import attention
from ras_fast.registration import register

SCRIPT = """
import sys
import ras_fast
assert 'transformers' not in sys.modules
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
import pytest
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
assert 'ras_fast' in ALL_ATTENTION_FUNCTIONS and 'ras_fast' in ALL_MASK_ATTENTION_FUNCTIONS
assert not any('ras_fast' in type(finder).__module__ for finder in sys.meta_path)
"""


@pytest.mark.slow  # a fresh process imports torch and transformers
def test_registered_when_transformers_is_imported_later():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_registered_when_transformers_was_there_first():
    register()
    assert AttentionInterface._global_mapping["ras_fast"] is attention.attention
    assert AttentionMaskInterface._global_mapping["ras_fast"] is attention.attention_mask
    assert not any("ras_fast" in type(finder).__module__ for finder in sys.meta_path)
