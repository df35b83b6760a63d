"""The language modelling loss of the sentence generator (ChEX: sentence tokens, anatomy tokens, its pre-training)."""

from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from .matching import ObjectiveMode
from .reduction import SINGLE_PROCESS, Collectives, full_precision


IGNORED = -100


@full_precision
def generation_loss(
    logits: Tensor,
    token_ids: Tensor,
    token_mask: Tensor,
    objective_mode: ObjectiveMode = "corrected",
    collectives: Collectives = SINGLE_PROCESS,
) -> Tensor:
    """Sentence and anatomy generation loss: cross-entropy of the next token, teacher-forced (ChEX, LM loss).

    With x_1, ..., x_T the start token, the tokens of a text and the end token, and r the feature that the generator
    is conditioned on,

        L = mean over all texts and 1 <= t < T of -log softmax(logits_t)[x_(t + 1)],   logits_t = f(x_1, ..., x_t; r)

    The mean is over the tokens of all texts together, so that long texts count more.

    Args:
        logits: (S, T, V) of the generator, at the position of each token.
        token_ids: (S, T) tokens, right-padded with the end token.
        token_mask: (S, T) bool or 0 and 1, True for all tokens from the start to the end token. Rows without any are
            stand-ins for no text.
        objective_mode: "corrected" ends the sum behind the end token of each text. "official" counts the padding as
            more end tokens to be predicted, so that the loss depends on how much of it there is.
        collectives: the other processes of a distributed run.

    Returns:
        A scalar; 0, still connected to `logits`, without any text.
    """
    counted = token_mask.bool()
    if objective_mode == "official":
        counted = counted.any(dim=1, keepdim=True).expand_as(counted)
    count = collectives.mean_count(counted[:, 1:].sum().float())
    if collectives.counting:  # these logits stand in for others, and have no vocabulary
        return logits.sum() * 0.0
    # Position t predicts token t + 1; nothing follows the last one.
    following = pad(token_ids.masked_fill(~counted, IGNORED)[:, 1:], (0, 1), value=IGNORED)
    return cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="sum") / count


def padded_length(lengths: Tensor, collectives: Collectives = SINGLE_PROCESS) -> int:
    """The length to which the official code pads the texts of a step before it chooses some of them.

    Args:
        lengths: (S,) number of tokens of all candidates.
        collectives: the other processes of a distributed run.

    Returns:
        The greatest length in all processes, 0 without any candidate.
    """
    longest = lengths.new_zeros(1) if len(lengths) == 0 else lengths.amax(dim=0, keepdim=True)
    return int(collectives.gather(longest).max())
