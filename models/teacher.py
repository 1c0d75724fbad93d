"""The moving-average teacher and the feature queue."""

import copy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.encoders import DualEncoder


def make_teacher(student: DualEncoder, language: bool) -> DualEncoder:
    """A copy of the student without gradients; `language`: mlm distils, so the fusion encoder and its head stay."""
    teacher = copy.deepcopy(student)
    teacher.codebook = None  # one codebook scores both (docs/spec/codebook.md 4)
    for name in ("temperature", "log_scale", "bias"):
        if hasattr(teacher, name):
            delattr(teacher, name)
    if not language:
        teacher.fusion = None
    elif teacher.fusion is not None:
        teacher.fusion.matching = None
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """theta_m <- momentum theta_m + (1 - momentum) theta, of every parameter the teacher has (docs/spec/tcl.md 1.3)."""
    online = dict(student.named_parameters())
    names, copies = zip(*teacher.named_parameters(), strict=True)
    torch._foreach_mul_(copies, momentum)
    torch._foreach_add_(
        copies, [online[name].to(c.dtype) for name, c in zip(names, copies, strict=True)], alpha=1 - momentum
    )


class FeatureQueue(nn.Module):
    """First in, first out: teacher features of earlier batches with the hashes that identify image and caption.

    Rows are entries (size M, width D). Equal on all workers, since all enqueue the same gathered rows.
    """

    image: Float[Tensor, "M D"]
    text: Float[Tensor, "M D"]
    image_id: Int[Tensor, " M"]
    caption_id: Int[Tensor, " M"]
    pointer: Int[Tensor, ""]
    filled: Int[Tensor, ""]

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        for name in ("image", "text"):
            self.register_buffer(name, torch.zeros(size, width))
        for name in ("image_id", "caption_id"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))
        for name in ("pointer", "filled"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @property
    def valid(self) -> Bool[Tensor, " M"]:
        """Entries that have been written."""
        return torch.arange(len(self.image), device=self.image.device) < self.filled

    def newest(self, count: int) -> tuple[Float[Tensor, "2 R D"], Bool[Tensor, " R"]]:
        """The last `count` (at most M) entries, newest first: images and texts, and whether each has been written."""
        back = torch.arange(1, count + 1, device=self.image.device)
        places = (self.pointer - back) % len(self.image)
        return torch.stack([self.image[places], self.text[places]]), back <= self.filled

    @torch.no_grad()
    def enqueue(
        self,
        image: Float[Tensor, "N D"],
        text: Float[Tensor, "N D"],
        image_id: Int[Tensor, " N"],
        caption_id: Int[Tensor, " N"],
    ) -> None:
        """Write N entries at the pointer, wrapping at the end; of more than M only the last M are kept."""
        size, count = len(self.image), len(image)
        if size == 0 or count == 0:
            return
        skip = max(count - size, 0)
        places = (self.pointer + torch.arange(skip, count, device=self.image.device)) % size
        for buffer, rows in ((self.image, image), (self.text, text)):
            buffer[places] = rows[skip:].to(buffer.dtype)
        self.image_id[places] = image_id[skip:]
        self.caption_id[places] = caption_id[skip:]
        self.pointer.add_(count).remainder_(size)
        self.filled.add_(count).clamp_(max=size)
