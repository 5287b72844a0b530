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
