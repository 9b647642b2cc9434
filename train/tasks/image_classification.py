"""Classification of images by a vision transformer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from models import vit
from models.params import cast
from train.data.epochs import Epochs
from train.data.images import Images, load_images
from train.step import DTYPES
from train.task import BaseTask, Context


@struct.dataclass
class Told:
    """How positions are told beside the model's own: see :func:`models.vit.forward`."""

    policy: Any = None  # an AttentionPolicy
    added: Any = None  # (1 or b, tokens, width)


@dataclasses.dataclass(frozen=True)
class ImageClassification(BaseTask):
    """A vision transformer; evaluated by its accuracy on images that are held out.

    Attributes:
        model: the model.
        images: see :func:`train.data.images.load_images`.
        held_out: how many of them are not trained on.
        evaluation_rows: images of a batch in evaluation; they divide ``held_out``.
    """

    model: vit.Config
    images: str
    held_out: int
    evaluation_rows: int = 128

    @functools.cached_property
    def splits(self) -> tuple[Images, Images]:
        """Images to train on, and others.

        Raises:
            FileNotFoundError, ValueError: see :mod:`train.data.images`, or images of another kind
                than the model's.
        """
        images = load_images(self.images)
        if images.values.shape[1:] != (*self.model.image_size, self.model.channels):
            raise ValueError(
                f"the images are {images.values.shape[1:]} and the model is for "
                f"{(*self.model.image_size, self.model.channels)}: give the model that size."
            )
        if images.labels.max() >= self.model.classes:
            raise ValueError(
                f"a label is {images.labels.max()} and the model has {self.model.classes} classes."
            )
        return images.split(self.held_out)

    def specs(self) -> Any:
        """The model's parameters."""
        return vit.specs(self.model)

    def vision(self, params: Any) -> vit.Params:
        """The model within the task's parameters: for tasks that train more than it."""
        return params

    def told(self, params: Any, grid: tuple[int, int]) -> Told:
        """Positions of the patches of a grid in evaluation, beside the model's own."""
        return Told()

    def data(self, context: Context) -> grain.IterDataset:
        """Batches of images and labels, every image once per epoch."""
        rows = _Rows(self.splits[0], context)
        batches = grain.MapDataset.source(rows).batch(rows.own)
        beside = self.beside(context)
        if beside is not None:
            batches = batches.map_with_index(lambda number, batch: {**batch, **beside(number)})
        return batches.to_iter_dataset()

    def beside(self, context: Context) -> Callable[[int], dict[str, np.ndarray]] | None:
        """What stands beside the images in a batch, by the batch's number; None: nothing."""
        return None

    def logits(
        self, params: Any, images: Float[Array, "b h w c"], told: Told | None = None
    ) -> Float[Array, "b classes"]:
        """Float32 logits of images of any size that patches fill."""
        model, cfg = self.vision(params), self.model
        grid = cfg.grid_of((images.shape[1], images.shape[2]))
        told = self.told(params, grid) if told is None else told
        out = vit.forward(model, cfg, 2 * images - 1, policy=told.policy, added=told.added)
        return vit.classify(model, out)

    def loss(
        self, params: Any, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Mean cross-entropy in nats, and the share of right answers."""
        return cross_entropy(self.logits(params, batch["images"]), batch["labels"])

    def evaluate(self, params: Any, context: Context) -> dict[str, float]:
        """``accuracy`` on the images held out."""
        dtype = DTYPES[context.config.compute_dtype]
        rest = self.splits[1]
        return {"accuracy": self.accuracy(cast(params, dtype), rest.values, rest.labels)}

    def accuracy(
        self, params: Any, images: Float[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]
    ) -> float:
        """Share of right answers.

        Raises:
            ValueError: the images are no whole batches of ``evaluation_rows``.
        """
        rows = self.evaluation_rows
        if len(images) % rows:
            raise ValueError(
                f"{len(images)} images in batches of {rows}: make held_out a multiple."
            )
        right = _right(self)
        count = sum(
            int(right(params, images[i : i + rows], labels[i : i + rows]))
            for i in range(0, len(images), rows)
        )
        return count / len(images)


def cross_entropy(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"]
) -> tuple[Array, dict[str, Array]]:
    """Mean nats and accuracy."""
    logs = jax.nn.log_softmax(logits)
    nats = -jnp.mean(jnp.take_along_axis(logs, labels[:, None], 1))
    return nats, {"accuracy": jnp.mean((jnp.argmax(logits, 1) == labels).astype(jnp.float32))}


@functools.cache
def _right(task: ImageClassification) -> Any:
    """The compiled number of right answers of a batch, one program for each size of images."""

    def count(params: Any, images: Array, labels: Array) -> Array:
        return jnp.sum(jnp.argmax(task.logits(params, images), 1) == labels)

    return jax.jit(count)


class _Rows:
    """This process's images, batch after batch without end."""

    def __init__(self, images: Images, context: Context):
        self._images, self._batch = images, context.config.batch_size
        self._order = Epochs(len(images), context.config.seed)
        self.own = self._batch // context.process_count
        self._first = context.process_index * self.own

    def __len__(self) -> int:
        return 2**40 // self.own * self.own  # whole batches, without end

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, row = divmod(index, self.own)
        chosen = self._order[step * self._batch + self._first + row]
        return {"images": self._images.values[chosen], "labels": self._images.labels[chosen]}
