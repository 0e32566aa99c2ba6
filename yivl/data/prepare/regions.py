"""Regions of images: RefCOCO and Visual Genome, with boxes as ``records.box_text`` writes them.

RefCOCO: the fields that lichengunc/refer reads: ``split``, ``ann_id`` and ``sentences`` (``sent``) of ``refs(unc).p``,
and ``annotations`` (``bbox``: x, y, width, height in pixels) and ``images`` of ``instances.json``. The ``file_name`` of
a reference names no image and is ignored, as there.
Visual Genome: version 1.2, as the loader in huggingface/datasets reads it: ``regions`` (``phrase``, ``x``, ``y``,
``width``, ``height``), ``qas`` (``question``, ``answer``), and ``image_data.json`` with the size of an image and its
``url``, which says in which of the two image folders it is.
"""

from collections.abc import Iterator
from typing import Any, Final

from yivl.data.prepare.records import SHORT_ANSWER, BadRecords, OfficialFolder, ask, box_text

LOCATE: Final = "Provide the bounding box coordinate of the region this sentence describes: "
DESCRIBE_REGION: Final = "Provide a short description for this region: "
"""Beginnings of questions. Source: LLaVA-1.5 (arXiv 2310.03744), its prompts for RefCOCO and Visual Genome."""


def refcoco(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per expression of the training split (UNC): the answer is the box of the object."""
    name = "refs(unc).json" if folder.has("refs(unc).json") else "refs(unc).p"
    references = folder.json(name) if name.endswith(".json") else folder.pickle(name)
    instances = folder.json("instances.json")
    boxes = {annotation["id"]: annotation for annotation in instances["annotations"]}
    images = {image["id"]: image for image in instances["images"]}
    for index, reference in enumerate(references):
        with bad.skip(f"reference {index}"):
            if reference["split"] != "train":
                continue
            image = images[boxes[reference["ann_id"]]["image_id"]]
            box = box_text(boxes[reference["ann_id"]]["bbox"], image["width"], image["height"])
            for sentence in reference["sentences"]:
                with bad.skip(f"reference {index}"):
                    yield ask(f"coco/train2014/{image['file_name']}", LOCATE + sentence["sent"].strip(), box)


def visual_genome(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the questions, and the regions with their phrases."""
    images = {image["image_id"]: image for image in folder.json("image_data.json")}
    for index, record in enumerate(folder.json("question_answers.json")):
        with bad.skip(f"questions {index}"):
            for pair in record["qas"]:
                with bad.skip(f"questions {index}"):
                    answer = pair["answer"].strip().rstrip(".")
                    yield ask(_image(images[pair["image_id"]]), pair["question"] + SHORT_ANSWER, answer)
    for index, record in enumerate(folder.json("region_descriptions.json")):
        with bad.skip(f"regions {index}"):
            for region in record["regions"]:
                with bad.skip(f"regions {index}"):
                    image = images[region["image_id"]]
                    corner_and_size = (region["x"], region["y"], region["width"], region["height"])
                    box = box_text(corner_and_size, image["width"], image["height"])
                    yield ask(_image(image), DESCRIBE_REGION + box, region["phrase"])


def _image(record: dict[str, Any]) -> str:
    """Return the path of an image, whose address ends in ``VG_100K/1.jpg`` or ``VG_100K_2/1.jpg``."""
    return "visual-genome/" + "/".join(record["url"].split("/")[-2:])
