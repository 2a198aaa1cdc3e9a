"""What tuning minimises: of a block its hidden states' error, of the whole model the divergence of its logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens whose distributions over the vocabulary exist at a time.
_DIVERGENCE_TOKENS = 64


def relative_loss(output: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over tokens of the error's energy over the target's.

    A plain mean squared error would be that of the few tokens with massive activations. The logarithm keeps tokens
    beyond repair from pulling at all the others.

    Args:
        output: `[batch, seqlen, hidden_size]`.
        target: the same, from the full-precision model.
    """
    error = (output.float() - target).square().sum(-1)
    return torch.log1p(error / target.square().sum(-1).clamp_min(1e-12)).mean()


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean over tokens of KL(teacher || student), in nats.

    Args:
        logits: `[batch, seqlen, vocab_size]`.
        teacher: the same, of the full-precision model.
    """
    return _Divergence.apply(logits, teacher)


class _Divergence(torch.autograd.Function):
    """Mean KL(teacher || student) over tokens; makes its gradient at once, a few tokens at a time.

    With vocabularies of 50 to 250 thousand, autograd would keep half a dozen tensors of the size of the logits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = logits.flatten(0, -2), teacher.flatten(0, -2)
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for start in range(0, len(student), _DIVERGENCE_TOKENS):
            part = slice(start, start + _DIVERGENCE_TOKENS)
            log_q = F.log_softmax(student[part].float(), -1)
            log_p = F.log_softmax(teacher[part].float(), -1)
            p = log_p.exp()
            gradient[part] = (log_q.exp() - p) / len(student)
            total += torch.dot(p.view(-1), log_p.sub_(log_q).view(-1))
        ctx.save_for_backward(gradient.view_as(logits))
        return total / len(student)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None
