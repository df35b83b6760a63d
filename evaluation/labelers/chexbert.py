"""CheXbert (Smit et al. 2020, arXiv 2004.09167): a BERT that reads the 14 findings of CheXpert in a report."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from tqdm import tqdm
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedModel
from transformers.utils import ModelOutput

from .base import CHEXPERT_CLASSES, NEGATED, PRESENT, UNCERTAIN, LabelerUnavailable


MAX_TOKENS = 512
NO_FINDING = "No Finding"
# Meaning of the answers of a head: not mentioned (None), positive, negative, uncertain.
ANSWERS = (None, PRESENT, NEGATED, UNCERTAIN)


@strict
class ChexbertConfig(BertConfig):
    r"""
    Configuration of [`ChexbertModel`]: that of its BERT (by default bert-base-uncased), and the dropout of its heads.

    Args:
        head_dropout (`float`, defaults to 0.1): Dropout of the [CLS] feature before the heads, in training.
    """

    model_type = "chexbert"

    head_dropout: float | int = 0.1


@dataclass
class ChexbertOutput(ModelOutput):
    """
    Args:
        logits: 14 tensors in the order of `CHEXPERT_CLASSES`, (B, 4) for blank, positive, negative and uncertain; the
            last, of "No Finding", (B, 2) for blank and positive.
    """

    logits: tuple[torch.Tensor, ...] | None = None


class ChexbertModel(PreTrainedModel):
    """BERT with one linear head per finding on the last hidden state of [CLS]."""

    config_class = ChexbertConfig
    base_model_prefix = "chexbert"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _no_split_modules = ["BertLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ChexbertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.head_dropout)
        self.linear_heads = nn.ModuleList(
            nn.Linear(config.hidden_size, 2 if name == NO_FINDING else len(ANSWERS)) for name in CHEXPERT_CLASSES
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> ChexbertOutput:
        """
        Args:
            input_ids: (B, T) tokens with [CLS] first and [SEP] last, T at most 512.
            attention_mask: (B, T), 1 for tokens and 0 for padding.
        """
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        feature = self.dropout(hidden[:, 0])  # (B, D)
        return ChexbertOutput(logits=tuple(head(feature) for head in self.linear_heads))


class ChexbertLabeler:
    """
    CheXbert as a labeller (`evaluation.labelers.Labeler`).

    Texts are prepared as CheXbert's own script does: white space is merged, the tokenizer lower-cases, at most 512
    tokens with [CLS] and [SEP] are read. An empty text states only No Finding; the model is not asked.

    Args:
        model: Put into evaluation mode on `device`.
        tokenizer: Of its vocabulary.
        device: Such as "cpu" or "cuda".
        batch_size: Texts at once; they are sorted by length, so that there is little padding.
        progress: Show a bar on a terminal.
    """

    name = "chexbert"
    classes = CHEXPERT_CLASSES

    def __init__(
        self,
        model: ChexbertModel,
        tokenizer: BertTokenizer,
        device: str = "cpu",
        batch_size: int = 32,
        progress: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
        self.device = torch.device(device)
        self.model, self.tokenizer = model.eval().to(self.device), tokenizer
        self.batch_size, self.progress = batch_size, progress
        self.max_tokens = min(MAX_TOKENS, model.config.max_position_embeddings)

    @classmethod
    def from_folder(
        cls, folder: Path | str, device: str = "cpu", batch_size: int = 32, progress: bool = False
    ) -> "ChexbertLabeler":
        """
        From a folder that `chex convert chexbert` wrote.

        Raises:
            LabelerUnavailable: The folder holds no CheXbert, not all of its weights, or no tokenizer.
        """
        again = f"convert chexbert.pth again: chex convert chexbert chexbert.pth {folder} --tokenizer ..."
        try:
            config = ChexbertConfig.from_pretrained(folder, local_files_only=True)
            if config.model_type != "chexbert":
                raise LabelerUnavailable(f"the folder {folder} holds a {config.model_type}, no CheXbert; {again}")
            model, info = ChexbertModel.from_pretrained(
                folder, config=config, local_files_only=True, output_loading_info=True
            )
            tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        except LabelerUnavailable:
            raise
        except Exception as error:  # damaged files can fail in any way
            reason = " ".join(str(error).split())[:200]
            raise LabelerUnavailable(f"the CheXbert in {folder} cannot be loaded ({reason}); {again}") from error
        lost = sorted((*info["missing_keys"], *info["unexpected_keys"]))
        if lost:
            raise LabelerUnavailable(
                f"the weights in {folder} are not those of a CheXbert: {', '.join(lost)}; {again}"
            )
        # From a folder without a vocabulary comes a tokenizer of special tokens alone.
        if not 5 < len(tokenizer) <= config.vocab_size:
            raise LabelerUnavailable(
                f"the tokenizer in {folder} has {len(tokenizer)} tokens for a model of {config.vocab_size}; {again}"
            )
        return cls(model, tokenizer, device, batch_size, progress)

    def answers(self, texts: Sequence[str]) -> torch.Tensor:
        """(P, 14) int64: 0 blank, 1 positive, 2 negative, 3 uncertain, as the official script counts them."""
        cleaned = [" ".join(text.split()) for text in texts]
        result = torch.zeros(len(texts), len(CHEXPERT_CLASSES), dtype=torch.long)
        result[[index for index, text in enumerate(cleaned) if not text], CHEXPERT_CLASSES.index(NO_FINDING)] = 1
        filled = [index for index, text in enumerate(cleaned) if text]
        if not filled:
            return result
        tokens = self.tokenizer(
            [cleaned[index] for index in filled],
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        # Longest first: what does not fit into memory fails at once.
        order = sorted(range(len(filled)), key=lambda index: -len(tokens[index]))
        starts = range(0, len(order), self.batch_size)
        quiet = not (self.progress and sys.stderr.isatty())
        with torch.inference_mode():
            for start in tqdm(starts, desc="CheXbert", unit="batch", disable=quiet):
                rows = order[start : start + self.batch_size]
                lengths = torch.tensor([len(tokens[row]) for row in rows])
                inputs = torch.full((len(rows), int(lengths.max())), self.tokenizer.pad_token_id)
                for line, row in enumerate(rows):
                    inputs[line, : len(tokens[row])] = torch.tensor(tokens[row])
                mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
                output = self.model(inputs.to(self.device), mask.to(self.device))
                found = torch.stack([logits.argmax(-1) for logits in output.logits], dim=1)
                result[[filled[row] for row in rows]] = found.cpu()
        return result

    def __call__(self, texts: Sequence[str]) -> list[dict[str, int]]:
        """One dict per text: finding -> 1 (present), 0 (negated) or -1 (uncertain); blank findings are missing."""
        return [
            {
                name: value
                for name, answer in zip(CHEXPERT_CLASSES, row, strict=True)
                if (value := ANSWERS[answer]) is not None
            }
            for row in self.answers(texts).tolist()
        ]


__all__ = ["ChexbertConfig", "ChexbertLabeler", "ChexbertModel", "ChexbertOutput"]
