"""A teacher's most probable tokens, written out with full logits: what the cache and the loss are compared with."""

import torch
from torch import Tensor

from minitron_search.losses.output_loss import TopK
from minitron_search.models.output_head import OutputHead


@torch.no_grad()
def top_k(hidden: Tensor, head: OutputHead, k: int) -> TopK:
    """The k most probable next tokens of every position of `hidden` (T, H), k at most V."""
    logits = (hidden @ head.weight.t()).float()
    logits = head.scale * (logits if head.bias is None else logits + head.bias)
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    kept, indices = logits.topk(k)
    rest = logits.scatter(1, indices, -torch.inf).logsumexp(1, keepdim=True)
    total = torch.cat([kept, rest], 1).logsumexp(1, keepdim=True)
    return TopK(indices, kept - total, (rest - total).squeeze(1))
