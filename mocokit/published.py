"""Values of the papers, each with its table. The one place that they are quoted from."""

from typing import NamedTuple


class VocRow(NamedTuple):
    """AP50, AP (COCO-style) and AP75 on VOC test2007, mean of 5 trials."""

    name: str
    ap50: float
    ap: float
    ap75: float


VOC_SOURCE = {
    "07+12": "MoCo v2, arXiv 2003.04297, Table 1; random: MoCo v1, arXiv 1911.05722",
    "07": "MoCo v1, arXiv 1911.05722, appendix",
}
# Faster R-CNN R50-C4, 24,000 iterations on trainval07+12, and 9,000 on trainval07.
VOC = {
    "07+12": (
        VocRow("random initialisation", 60.2, 33.8, 33.1),
        VocRow("supervised ImageNet", 81.3, 53.5, 58.8),
        VocRow("MoCo v1, 200 epochs", 81.5, 55.9, 62.6),
        VocRow("MoCo v2, 200 epochs", 82.4, 57.0, 63.6),
        VocRow("MoCo v2, 800 epochs", 82.5, 57.4, 64.0),
    ),
    "07": (
        VocRow("supervised ImageNet", 74.4, 42.4, 42.7),
        VocRow("MoCo v1, 200 epochs", 74.9, 46.6, 50.1),
    ),
}
VOC_IMAGES = {"07+12": (16_551, 4_952), "07": (5_011, 4_952)}  # training, test: VOC's own lists
# Standard deviations of AP50, AP, AP75 between trials: detection/README of facebookresearch/moco.
VOC_DEVIATIONS = (0.2, 0.2, 0.4)
# By recipe, the row of VOC["07+12"] that its weights have.
VOC_OF_RECIPE = {
    "mocov1": "MoCo v1, 200 epochs",
    "mocov2": "MoCo v2, 200 epochs",
    "mocov2_800": "MoCo v2, 800 epochs",
}


class Accuracy(NamedTuple):
    """What a paper or its authors' code reports for a recipe, in percent."""

    scores: dict[str, float]  # by probe: linear, kNN
    source: str
    protocol: str = ""
    images: str = ""  # where the recipe's name leaves them open
    about: bool = False  # the authors round it

    def short(self) -> str:
        """The scores alone."""
        about = "about " if self.about else ""
        digits = 0 if self.about else 1
        return ", ".join(f"{k} {about}{value:.{digits}f}" for k, value in self.scores.items())

    def __str__(self) -> str:
        words = (self.images, self.short(), self.protocol, f"({self.source}).")
        return " ".join(word for word in words if word)


_TABLE_1 = "arXiv 2003.04297, Table 1"
_TABLE_2 = "arXiv 2003.04297, Table 2"
_NOTEBOOK = "on the head's output, k 200, temperature 0.1"
# By recipe. A recipe that is missing has no published accuracy at its settings.
ACCURACY = {
    "mocov1": Accuracy({"linear": 60.6}, _TABLE_1, images="ImageNet"),
    "mocov2": Accuracy({"linear": 67.5}, _TABLE_1, images="ImageNet"),
    "mocov2_800": Accuracy({"linear": 71.1}, _TABLE_1, images="ImageNet"),
    "mocov2_symmetric": Accuracy(
        {"linear": 69.9},
        "arXiv 2011.10566, Table 4, their implementation",
        "at 200 epochs",
        "ImageNet",
    ),
    "mocov2plus": Accuracy({"linear": 72.4}, "megvii's revisitAIRL", "at 200 epochs", "ImageNet"),
    "ablation_a": Accuracy({"linear": 66.2}, _TABLE_1, images="ImageNet"),
    "ablation_b": Accuracy({"linear": 63.4}, _TABLE_1, images="ImageNet"),
    "ablation_c": Accuracy({"linear": 67.3}, _TABLE_1, images="ImageNet"),
    "endtoend_v1": Accuracy(
        {"linear": 54.9},
        "arXiv 1911.05722, Fig. 3, K 256",
        "at batch 256, where the dictionary is as large as the batch",
        "ImageNet",
    ),
    "simclr": Accuracy({"linear": 69.3}, _TABLE_2, images="ImageNet"),
    "simclr_256": Accuracy({"linear": 61.9}, _TABLE_2, images="ImageNet"),
    "memorybank": Accuracy({"linear": 54.0, "kNN": 42.5}, "arXiv 1805.01978", images="ImageNet"),
    "memorybank_softmax": Accuracy(
        {"linear": 58.0}, "arXiv 1911.05722, Fig. 3, K 65536", images="ImageNet"
    ),
    "mocov2_cifar10": Accuracy({"kNN": 82.6}, "the authors' notebook", _NOTEBOOK),
    "mocov2_cifar10_symmetric": Accuracy({"kNN": 85.3}, "the authors' notebook", _NOTEBOOK),
    "simclr_cifar10": Accuracy({"linear": 91.0}, "the authors' README", about=True),
    "memorybank_cifar10": Accuracy(
        {"kNN": 80.8, "linear": 75.4},
        "the authors' repository; the best epoch on the test set",
    ),
}
