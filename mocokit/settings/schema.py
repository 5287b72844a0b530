"""Every setting of a run: its type, default, range and a line of meaning, declared once.

Sizes are global: batch, queue and learning rate mean the same on one GPU or eight. A setting made
with `incidental` says where or how often something happens and never changes a training number; all
others are the run's identity. `auto` is settled from the device when a run starts, and stored.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from mocokit.settings.methods import MethodSettings, MoCoSettings, read_method
from mocokit.settings.section import (
    Drawn,
    Factor,
    Magnitude,
    Positive,
    Section,
    Shares,
    Spread,
    incidental,
    setting,
)

LARGEST_SIDE = 2**14  # pixels; a photo enlarged beyond it fills the memory
Workers = Annotated[int, Field(ge=0, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Width = Annotated[int, Field(ge=1, le=2**20)]
Level = Annotated[float, Field(ge=-1e3, le=1e3)]
Scale = Annotated[float, Field(ge=1e-6, le=1e3)]
Sigma = Annotated[float, Field(ge=1e-3)]
Area = Annotated[float, Field(ge=1e-6)]
ViewOp = Literal["crop", "flip", "jitter", "grayscale", "blur", "solarize", "randaugment"]


class Data(Section):
    path: str | None = incidental(
        None, "folder, archives, list, arrays, a known set, or several joined by ::; null: the demo"
    )
    root: str | None = incidental(
        None, "where sets known by name lie or are downloaded to; null: the user's cache folder"
    )
    labels: Literal["auto", "folders", "none"] = setting(
        "auto", "auto: labels of an .npz or of train/ and val/; folders: every folder is a class"
    )
    last: Literal["drop", "keep"] = setting("drop", "what to do with an epoch's last partial batch")
    workers: Workers | Literal["auto"] = incidental(
        "auto", "decoding processes of each GPU's process"
    )
    bad_share: float = incidental(
        0.01, "share of unreadable images (at least 10 images) at which the run stops", ge=0, le=1
    )


class Views(Section):
    size: int = setting(224, "side of a view in pixels", ge=8, le=2048)
    order: tuple[ViewOp, ...] = setting(
        ("crop", "jitter", "grayscale", "blur", "flip"), "operations in the order they are applied"
    )
    crop_area: tuple[Area, Area] = setting((0.2, 1.0), "share of the image's area in a crop")
    crop_ratio: tuple[Factor, Factor] = setting((3 / 4, 4 / 3), "width over height of a crop")
    interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear", "how crops and evaluation views are resized; both antialiased, as in PIL"
    )
    jitter_probability: float = setting(0.8, "share of views with colour jitter", ge=0, le=1)
    brightness: float = setting(0.4, "brightness factor is in [1-b, 1+b]", ge=0, le=100)
    contrast: float = setting(0.4, "contrast factor is in [1-c, 1+c]", ge=0, le=100)
    saturation: float = setting(0.4, "saturation factor is in [1-s, 1+s]", ge=0, le=100)
    hue: float = setting(0.1, "hue shift in turns of the colour circle is in [-h, h]", ge=0, le=0.5)
    grayscale_probability: float = setting(0.2, "share of views made gray", ge=0, le=1)
    blur_probability: Shares = setting(
        0.5, "share of views with Gaussian blur; two numbers: of first views, of second views"
    )
    blur_sigma: tuple[Sigma, Sigma] = setting((0.1, 2.0), "standard deviation of the blur, pixels")
    solarize_probability: Shares = setting(
        0.0, "share of views whose bright half is inverted; two numbers: of first, of second views"
    )
    randaugment: tuple[Drawn, Magnitude, Spread] = setting(
        (2, 10.0, 0.5),
        "where order names it: operations drawn for a view, each applied in half of cases; their "
        "magnitude, of 10, and its standard deviation (timm's rand-n2-m10-mstd0.5)",
    )
    flip_probability: float = setting(0.5, "share of views mirrored left to right", ge=0, le=1)
    mean: tuple[Level, Level, Level] = setting((0.485, 0.456, 0.406), "RGB mean taken off")
    std: tuple[Scale, Scale, Scale] = setting((0.229, 0.224, 0.225), "RGB deviation divided by")
    canvas: int | None = setting(
        None,
        "short side in pixels that decoded images keep at least; null: what the crops can use (a "
        "run of 0.1 has the size of its evaluation view here)",
        ge=8,
        le=LARGEST_SIDE,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.order)) != len(self.order):
            raise ValueError("order names an operation twice")
        if self.order[:1] != ("crop",):
            raise ValueError("order must begin with crop, which gives every view its size")
        if {"flip", "randaugment"} <= set(self.order[1:]) and (
            self.order.index("flip") > self.order.index("randaugment")
        ):
            raise ValueError("order must name flip before randaugment, which a flip would turn")
        for name in ("crop_area", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two numbers, 0 < low <= high")
        if self.blur_sigma[1] > self.size:
            raise ValueError("blur_sigma cannot exceed size, the side of a view")
        if self.crop_area[1] > 1:
            raise ValueError("crop_area cannot exceed 1, the whole image")
        return self


class Net(Section):
    backbone: str = setting("resnet50", "a timm model by name, or resnet_tiny")
    stem: Literal["imagenet", "small"] = setting(
        "imagenet", "small: a 3x3 stem of stride 1 and no max-pool, for images of about 32 pixels"
    )
    zero_init_last: bool = setting(False, "start each residual block's last BN scale at zero")
    head: Literal["linear", "mlp", "mlp_bn"] = setting(
        "mlp", "projection head: one layer, two with a ReLU, or two with batch norm and a ReLU"
    )
    predictor: bool = setting(False, "an mlp_bn from dim to dim after the query's head alone")
    hidden: Width | None = setting(
        None, "width of an mlp head and of the predictor; null is the backbone's"
    )
    dim: int = setting(128, "dimensions of queries and keys", ge=2, le=2**16)
    calibrate_head: bool = setting(
        False, "rescale the head's layers to zero mean and unit variance on the first group"
    )


class Optim(Section):
    name: Literal["sgd", "adamw", "lars"] = setting("sgd", "optimiser")
    lr: float = setting(0.03, "peak learning rate, at lr_batch", gt=0)
    lr_batch: int = setting(256, "batch the learning rate was quoted at", ge=1)
    scale: Literal["linear", "sqrt", "none"] = setting("linear", "how lr follows the batch")
    momentum: float = setting(0.9, "momentum of SGD and LARS", ge=0, lt=1)
    weight_decay: float = setting(
        1e-4, "weight decay on all parameters, BN and biases too (LARS: on neither)", ge=0
    )
    trust: float = setting(0.001, "lars: trust coefficient", gt=0)
    schedule: Literal["steps", "cosine"] = setting("cosine", "how the learning rate falls")
    per: Literal["epoch", "step"] = setting("epoch", "how often the learning rate changes")
    first_epoch: Literal[0, 1] = setting(0, "number of the first epoch in the cosine")
    drops: tuple[float, ...] = setting((0.6, 0.8), "steps: shares of the run after which lr drops")
    drop_factor: float = setting(0.1, "steps: what each drop multiplies lr by", gt=0, lt=1)
    warmup_epochs: float = setting(0.0, "epochs in which lr rises linearly from zero", ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.drops) != sorted(self.drops) or not all(0 < d < 1 for d in self.drops):
            raise ValueError("drops must be rising shares between 0 and 1")
        return self


class Train(Section):
    epochs: int = setting(200, "passes over the images", ge=1, le=10**6)
    batch_size: int = setting(256, "images in a step, over all GPUs", ge=2, le=2**20)
    micro_batch: Positive | None = incidental(
        None, "do a step in pieces of about this many images, to save memory"
    )
    parent: str | None = incidental(None, "the run folder that this run lengthens (--extend)")
    parent_weights: str | None = setting(
        None, "hash of the parent's last weights, queue and key encoder, from which this run starts"
    )


class Engine(Section):
    device: str = incidental("auto", "auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the encoders; auto: bfloat16 where native, float16 on older GPUs, else float32"
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = setting(
        "auto", "layout of images in memory; auto is channels_last"
    )
    compile: Literal["auto"] | bool = setting("auto", "torch.compile the encoders; auto: on CUDA")
    cuda_graphs: Literal["auto"] | bool = incidental(
        "auto", "replay the compiled encoders as CUDA graphs; auto: on one GPU"
    )
    deterministic: bool = setting(False, "CUDA: only deterministic kernels, for equal bits")
    threads: Threads | Literal["auto"] = setting(
        "auto", "CPU threads of each process; on a CPU another number rounds differently"
    )
    compare_steps: int = incidental(
        500, "steps between comparisons of what several processes hold copies of", ge=1
    )


class Save(Section):
    minutes: float = incidental(15.0, "minutes between checkpoints", gt=0)
    every_epochs: int = incidental(1, "also at the end of every n-th epoch; 0: only the last", ge=0)
    every_steps: Positive | None = incidental(None, "also every n steps")
    keep: int = incidental(2, "newest checkpoints kept", ge=1)
    milestone_epochs: Positive | None = incidental(
        None, "keep for good every n-th epoch's checkpoint"
    )


class Log(Section):
    every_steps: int = incidental(10, "steps between lines of metrics.jsonl", ge=1)


class Monitor(Section):
    every_epochs: int = incidental(
        10, "epochs between kNN scores and health checks; 0: only at the end", ge=0
    )
    images: int = incidental(4096, "training images that health is measured on, at most", ge=2)
    k: Positive | None = incidental(
        None, "neighbours that vote; null: 200, or half of a class's images in the bank if fewer"
    )
    temperature: float = incidental(0.1, "a neighbour's weight is exp(cosine / temperature)", gt=0)
    bank: int = incidental(100_000, "training images in the bank, at most", ge=1)
    resize: int | None = incidental(
        None,
        "scoring view: short side in pixels before the centre crop of views.size; null: views.size "
        "over `centre`",
        ge=8,
        le=LARGEST_SIDE,
    )
    centre: float = incidental(
        0.875, "scoring view: side of the centre crop over the short side", ge=0.1, le=1
    )


class Settings(Section):
    recipe: str = incidental(
        "mocov2", "the recipe that the settings started from", pattern=r"^\w[\w.-]*$"
    )
    seed: int = setting(0, "every random number of the run follows from it", ge=0, lt=2**63)
    data: Data = Data()
    views: Views = Views()
    net: Net = Net()
    method: SerializeAsAny[MethodSettings] = MoCoSettings()
    optim: Optim = Optim()
    train: Train = Train()
    engine: Engine = Engine()
    save: Save = Save()
    log: Log = Log()
    monitor: Monitor = Monitor()

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        return read_method(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.method.check_net(predictor=self.net.predictor)
        if self.monitor.resize is not None and self.monitor.resize < self.views.size:
            raise ValueError(
                f"monitor.resize {self.monitor.resize} cannot be smaller than views.size "
                f"{self.views.size}, the centre crop"
            )
        side = round(self.views.size / self.monitor.centre)
        if self.monitor.resize is None and side > LARGEST_SIDE:
            raise ValueError(
                f"monitor.centre {self.monitor.centre:g} of views.size {self.views.size} is a "
                f"scoring view of {side:,} pixels; at most {LARGEST_SIDE:,} are possible"
            )
        return self
