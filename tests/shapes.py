"""Generated images with boxes, in PASCAL VOC's layout: red discs and blue bars on noise."""

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("bar", "disc")


def xml(objects, head=""):
    """An annotation of (name, (xmin, ymin, xmax, ymax)) or (name, box, difficult)."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    text = ""
    for name, box, *difficult in objects:
        inner = "".join(f"<{c}>{v}</{c}>" for c, v in zip(corners, box, strict=True))
        flag = int(bool(difficult and difficult[0]))
        text += f"<object><name>{name}</name><difficult>{flag}</difficult>"
        text += f"<bndbox>{inner}</bndbox></object>"
    return f"{head}<annotation>{text}</annotation>"


def write_voc(root, lists, pictures):
    """A folder of VOC's layout from {list: [names]} and {name: (image, annotation text)}."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, identities in lists.items():
        (root / "ImageSets/Main" / f"{name}.txt").write_text("\n".join(identities) + "\n")
    for identity, (picture, text) in pictures.items():
        picture.save(root / "JPEGImages" / f"{identity}.jpg", quality=95)
        (root / "Annotations" / f"{identity}.xml").write_text(text)
    return root


def write_shapes(root, train=48, test=16, seed=0):
    """A VOC folder of wide and tall images with one or two shapes each."""
    draw = np.random.default_rng(seed)
    lists = {
        "trainval": [f"a{number:03d}" for number in range(train)],
        "test": [f"b{number:03d}" for number in range(test)],
    }
    pictures = {identity: shapes(draw) for names in lists.values() for identity in names}
    return write_voc(root, lists, pictures)


def shapes(draw):
    tall, wide = (72, 96) if draw.random() < 0.5 else (96, 72)
    levels = draw.integers(60, 110, (tall, wide, 3)).astype(np.uint8)
    picture = Image.fromarray(levels)
    pen, objects = ImageDraw.Draw(picture), []
    for _ in range(draw.integers(1, 3)):
        name = CLASSES[draw.integers(2)]
        across = int(draw.integers(24, 44))
        down = across if name == "disc" else across // 2 + 4
        left, top = int(draw.integers(0, wide - across)), int(draw.integers(0, tall - down))
        corners = (left, top, left + across - 1, top + down - 1)
        if name == "disc":
            pen.ellipse(corners, fill=(230, 60, 60))
        else:
            pen.rectangle(corners, fill=(60, 60, 230))
        objects.append((name, (left + 1, top + 1, left + across, top + down)))
    return picture, xml(objects)


SMALL = {
    "sides": (72, 84),
    "test_side": 72,
    "anchor_sizes": (16.0, 32.0, 48.0),
    "rpn_batch": 16,
    "roi_batch": 16,
    "roi_positive": 0.5,
    "pre_nms_train": 200,
    "post_nms_train": 50,
    "pre_nms_test": 200,
    "post_nms_test": 30,
    "pooled": 6,
    "precise_bn": 6,
    "lr": 0.1,
}


def tiny_network(name="resnet_of_tests"):
    """Register a ResNet of four one-block stages with timm, under the name returned."""
    import timm
    from timm.models.resnet import BasicBlock, ResNet

    def entry(pretrained=False, num_classes=0, **others):
        return ResNet(BasicBlock, (1, 1, 1, 1), num_classes, channels=(16, 32, 64, 64))

    entry.__name__ = name
    entry.__module__ = __name__
    if not timm.is_model(name):
        timm.models.register_model(entry)
    return name
