"""The processors of models of random weights, whose words mean nothing. Tests use them, too."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Idefics3Processor, LlavaProcessor, PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>")
QWEN_SPECIAL = (*SPECIAL[:4], "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
SMOLVLM_SPECIAL = (
    *SPECIAL, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)  # fmt: skip


def word_processor(words, chat_template: str, image_size: int, patch_size: int) -> LlavaProcessor:
    """A LLaVA processor each of whose ``words``, which begin with SPECIAL, is one token."""
    side = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        LlavaImageProcessorPil(size=side, crop_size=side),
        word_tokenizer(words, SPECIAL),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def qwen_word_processor(words, chat_template: str, patch_size: int):
    """The same of Qwen3-VL, without videos, for words that begin with QWEN_SPECIAL."""
    images = Qwen2VLImageProcessorPil(patch_size=patch_size, temporal_patch_size=2, merge_size=2)
    processor = in_part(Qwen3VLProcessor)
    return processor(images, word_tokenizer(words, QWEN_SPECIAL), video_processor=None, chat_template=chat_template)


def smolvlm_word_processor(words, chat_template: str, tile_size: int, tile_tokens: int) -> Idefics3Processor:
    """The same of SmolVLM, whose images are cut into up to two by two tiles, for words that begin with SMOLVLM_SPECIAL."""
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * tile_size}, max_image_size={"longest_edge": tile_size})
    tokenizer = word_tokenizer(words, SMOLVLM_SPECIAL)
    return Idefics3Processor(images, tokenizer, image_seq_len=tile_tokens, chat_template=chat_template)


def in_part(processor: type) -> type:
    """The same class of processors without what is None: no videos, which need torchvision, no sounds."""

    class InPart(processor):
        def check_argument_for_proper_class(self, name, argument):
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    InPart.__name__ = processor.__name__  # by which a saved one is loaded
    return InPart


def word_tokenizer(words, special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(special[4:]),
    )
