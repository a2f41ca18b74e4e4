"""The processor of models of random weights, whose words mean nothing. Tests use it, too."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>")


def word_processor(words, chat_template: str, image_size: int, patch_size: int) -> LlavaProcessor:
    """A LLaVA processor each of whose ``words``, which begin with SPECIAL, is one token."""
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
    )
    side = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        LlavaImageProcessorPil(size=side, crop_size=side),
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
