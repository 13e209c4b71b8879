"""Which objects an image should show: from its caption and from COCO's annotations.

A small matcher finds COCO's 80 categories in a caption, with plurals and synonyms, number words and
the words for left, right, above and below. It does not parse sentences, so it misreads some
captions: 96 % of what it finds in the captions of 159 photographs is annotated. Where an image has
annotated objects, a named object counts only if the annotations confirm it.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from latent_t2i.evaluation.metrics.metric import Item
from latent_t2i.model.checks import read_json_object
from latent_t2i.model.paths import find_path

Box = tuple[float, float, float, float]
"""x, y, width, height, as shares of the image's sides."""

SYNONYMS: dict[str, str] = {
    "person": "man, woman, boy, girl, child, kid, baby, lady, guy, player, skier, snowboarder, "
    "surfer, skateboarder, rider, cyclist, bicyclist, motorcyclist, biker, pedestrian, "
    "toddler, adult, gentleman, batter, catcher, pitcher, umpire, chef, worker, officer, "
    "policeman, firefighter, fireman, teenager, student, tourist, soldier, cowboy, bride, "
    "groom, people, male, female",
    "bicycle": "bike",
    "car": "taxi, cab, suv, sedan, automobile",
    "motorcycle": "motorbike, motor bike, motor cycle, dirt bike, moped",
    "airplane": "plane, aeroplane, jet, airliner, jetliner, aircraft, seaplane",
    "bus": "double decker, minibus",
    "train": "locomotive",
    "truck": "pickup, lorry",
    "boat": "ship, sailboat, canoe, kayak, ferry, yacht, rowboat",
    "traffic light": "stoplight, traffic signal, stop light",
    "fire hydrant": "hydrant, firehydrant",
    "stop sign": "",
    "parking meter": "",
    "bench": "",
    "bird": "duck, goose, seagull, pigeon, parrot, owl, swan, gull, eagle, flamingo, hawk, pelican",
    "cat": "kitten, kitty",
    "dog": "puppy, pup",
    "horse": "pony, foal",
    "sheep": "lamb",
    "cow": "bull, calf, cattle, ox",
    "elephant": "",
    "bear": "panda",
    "zebra": "",
    "giraffe": "",
    "backpack": "back pack, rucksack, book bag",
    "umbrella": "parasol",
    "handbag": "purse, hand bag",
    "tie": "necktie, neck tie, bow tie, bowtie",
    "suitcase": "luggage, suit case",
    "frisbee": "flying disc",
    "skis": "",
    "snowboard": "snow board",
    "sports ball": "ball, soccer ball, tennis ball",
    "kite": "",
    "baseball bat": "bat",
    "baseball glove": "baseball mitt, mitt",
    "skateboard": "skate board",
    "surfboard": "surf board",
    "tennis racket": "racket, racquet, tennis racquet",
    "bottle": "",
    "wine glass": "wineglass",
    "cup": "mug",
    "fork": "",
    "knife": "",
    "spoon": "",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "",
    "orange": "",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog",
    "pizza": "",
    "donut": "doughnut",
    "cake": "",
    "chair": "",
    "couch": "sofa",
    "potted plant": "pottedplant, houseplant, house plant",
    "bed": "",
    "dining table": "table, diningtable",
    "toilet": "",
    "tv": "television, tvmonitor, tv monitor",
    "laptop": "laptop computer, lap top",
    "mouse": "computer mouse",
    "remote": "remote control, wii remote",
    "keyboard": "",
    "cell phone": "cellphone, smartphone, mobile phone, phone",
    "microwave": "microwave oven",
    "oven": "stove",
    "toaster": "",
    "sink": "",
    "refrigerator": "fridge",
    "book": "",
    "clock": "",
    "vase": "",
    "scissors": "",
    "teddy bear": "stuffed bear, teddy",
    "hair drier": "hair dryer, hairdryer, blow dryer",
    "toothbrush": "tooth brush",
}
"""COCO's categories in their order, each with further words for it in captions and in the labels of
detectors."""
CATEGORIES = tuple(SYNONYMS)
NOT_OBJECTS = (
    "train station, train track, bus stop, bus station, bird house, bird feeder, cat food, dog "
    "food, dog house, dog bed, horse drawn, horse shoe, boat house, apple juice, banana bread, "
    "cake pan, pizza box, pizza cutter, toilet paper, toilet seat, book shelf, book case, book "
    "store, tv stand, mouse pad, knife block, chair lift, table cloth, table tennis, ping pong "
    "table, cup holder, cup cake, baseball player, remote area, remote location, remote island, "
    "at bat, phone booth, phone line, car park, bear hug, tie dye, sandwich shop, pizza shop, "
    "pizza place, bed room, bike rack, bike lane, toilet bowl, pit bull, truck bed, flower bed, "
    "ball player, bed of flowers"
)
"""Phrases with the word for a category that do not mean one."""
NOT_OBJECTS_BUT = {
    "baseball player": "person", "ball player": "person", "ping pong table": "dining table",
    "toilet bowl": "toilet", "pit bull": "dog",
}  # fmt: skip
"""Those that mean another category."""
PLURALS = {
    "person": "persons", "man": "men", "woman": "women", "gentleman": "gentlemen",
    "child": "children", "policeman": "policemen", "fireman": "firemen", "goose": "geese",
    "sheep": "sheep", "calf": "calves", "ox": "oxen", "mouse": "mice", "knife": "knives",
    "broccoli": "broccoli", "aircraft": "aircraft",
}  # fmt: skip
SAME_PLURAL = ("sheep", "broccoli", "aircraft")
ALWAYS_PLURAL = ("people", "cattle", "luggage", "skis", "scissors")
"""Words without a number: a pair of scissors is one object, and luggage any number of suitcases."""
NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "single": 1, "lone": 1,
}  # fmt: skip
BREAK_WORDS = (
    "of and or with in on at by to from for the his her their its this that is are was who near "
    "next while several many some few group bunch herd lots no without behind under over above "
    "below , . ; :"
)
BREAKS = frozenset(BREAK_WORDS.split())
"""Words that end the search for a number to the left of a noun."""
NUMBER_REACH = 3
"""Words between a number and its noun: "two small brown dogs" has two."""
RELATION_REACH = 8
"""Most words between two nouns of one relation."""
RELATION_WORDS = {
    "left": r"(?:to|on|at) the left (?:hand )?(?:side )?of|left of",
    "right": r"(?:to|on|at) the right (?:hand )?(?:side )?of|right of",
    "above": r"above|on top of|atop",
    "below": r"below|under|underneath|beneath",
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})")
OFFSET_SHARE = 0.1
"""Share of the boxes' sizes by which their centres must differ, as in GenEval (2310.11513)."""
DIRECTION = 0.5
"""Least part of the distance along an axis, as in GenEval."""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """`first` is left of, right of, above or below `second`."""

    first: str
    name: str
    second: str


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The objects that an image should show, by category."""

    present: tuple[str, ...] = ()
    """Named by the prompt and, if there are annotations, confirmed by them."""
    counts: Mapping[str, int] = field(default_factory=dict)
    relations: tuple[Relation, ...] = ()
    known: frozenset[str] = frozenset()
    """Objects that are known to be in the prompt's image: annotated, or named by any caption."""
    known_counts: Mapping[str, int] = field(default_factory=dict)
    """Annotated numbers of objects of each category, without those that are marked as a crowd."""
    is_annotated: bool = False


@dataclass(frozen=True, kw_only=True)
class Mention:
    """A category in a caption, at the words `start` to `end`."""

    category: str
    start: int
    end: int
    number: int | None = None
    is_article: bool = False
    """The number is that of "a" or "an", which often names one object of several."""


def category_of(label: str) -> str | None:
    """Returns COCO's category for a detector's label; None if it has none."""
    words = tuple(_words(label.replace("_", " ").replace("-", " ")))
    found = _phrases().get(words)
    return found[0] if found else None


def find_mentions(caption: str) -> list[Mention]:
    """Returns the categories that a caption names, in order; the longest phrase wins."""
    words = _words(caption)
    mentions: list[Mention] = []
    index = 0
    while index < len(words):
        length, category, is_plural = _match(words, index)
        if category is not None and not _is_denied(words, index):
            number, is_article = _number_of(words, index, is_plural)
            mentions.append(
                Mention(category=category, start=index, end=index + length, number=number,
                        is_article=is_article)
            )  # fmt: skip
        index += length
    # Of "baby elephant" or "tv remote", the first word describes the second.
    followers = {mention.start for mention in mentions}
    return [mention for mention in mentions if mention.end not in followers]


def expected_of(captions: Sequence[str], objects: Sequence[Mapping[str, Any]]) -> Expected:
    """Returns what an image should show.

    The first of `captions` is the prompt; the others only add to what is known to be in the image.
    `objects` are the annotations, with `category`, `bbox` (x, y, width, height, as shares) and
    optionally `crowd`. Without captions, all annotated objects are expected.
    """
    boxes: dict[str, list[Box]] = {}
    for one in objects:
        boxes.setdefault(_canonical(one["category"]), []).append(one["bbox"])
    crowds = {_canonical(one["category"]) for one in objects if one.get("crowd")}
    counts = {name: len(found) for name, found in boxes.items() if name not in crowds}
    if not captions:
        return Expected(
            present=tuple(boxes),
            counts=counts,
            relations=_relations_of_boxes(tuple(boxes), boxes, counts),
            known=frozenset(boxes),
            known_counts=counts,
            is_annotated=bool(boxes),
        )
    mentions = find_mentions(captions[0])
    named = dict.fromkeys(mention.category for mention in mentions)
    present = tuple(name for name in named if not objects or name in boxes)
    known = boxes if objects else {m.category for text in captions for m in find_mentions(text)}
    relations = [
        *_relations_of_text(captions[0], mentions),
        *_relations_of_boxes(present, boxes, counts),
    ]
    return Expected(
        present=present,
        counts=_counts_of(mentions, present, counts if objects else None),
        relations=_without_repeats(r for r in relations if {r.first, r.second} <= {*present}),
        known=frozenset(known),
        known_counts=counts,
        is_annotated=bool(objects),
    )


def relations_between(first: Box, second: Box) -> frozenset[str]:
    """Returns where `first` lies as seen from `second`, by GenEval's rule (2310.11513).

    The offset of the centres is reduced by a tenth of the boxes' summed sizes; a side must hold at
    least half of the distance. A diagonal offset can give two relations.
    """
    offsets = [_centre(first, axis) - _centre(second, axis) for axis in (0, 1)]
    distance = math.hypot(*offsets)
    if distance == 0:
        return frozenset()
    slack = [OFFSET_SHARE * (first[axis + 2] + second[axis + 2]) for axis in (0, 1)]
    dx, dy = (
        math.copysign(max(abs(offset) - allowed, 0.0), offset) / distance
        for offset, allowed in zip(offsets, slack, strict=True)
    )
    cases = {"left": -dx, "right": dx, "above": -dy, "below": dy}
    return frozenset(name for name, value in cases.items() if value > DIRECTION)


def _centre(box: Sequence[float], axis: int) -> float:
    return box[axis] + box[axis + 2] / 2


def add_objects(items: Sequence[Item], instances: str | None) -> list[Item]:
    """Returns the items with the annotated objects of their images, by COCO id or file name.

    `instances` is a COCO instances file, or None for none. Raises ValueError for another file, and
    for one that has no image of the items.
    """
    if instances is None:
        return list(items)
    path = find_path(instances)
    if path is None:
        raise ValueError(
            f"--objects: no file {instances!r} in the current directory or the project; expected a "
            "COCO instances file"
        )
    known = _read_instances(path)
    found = [replace(item, objects=known.get(_image_name(item.key), ())) for item in items]
    if not any(item.objects for item in found):
        raise ValueError(
            f"--objects: {path} has no objects of the {len(found)} images of the captions, such as "
            f"{found[0].key if found else 'none'}; expected the instances file of the same split"
        )
    return found


def coco_id(name: str) -> int | None:
    """Returns the COCO id in an image's key or file name, or None.

    The layouts of 2014 (COCO_val2014_000000000042.jpg) and 2017 (000000000042.jpg) have the same
    ids for the same images.
    """
    match = COCO_NAME.fullmatch(name.rpartition("/")[2].partition(".")[0])
    return int(match.group(1)) if match else None


def _image_name(name: str) -> str:
    """Returns a COCO id without its layout, else the file's name without suffix."""
    number = coco_id(name)
    return Path(name).stem if number is None else str(number)


def _read_instances(path: Path) -> dict[str, tuple[Mapping[str, Any], ...]]:
    """Returns the objects of each image of a COCO instances file."""
    document = read_json_object(path, dict.fromkeys(("images", "annotations", "categories"), list))
    try:
        names = {one["id"]: one["name"] for one in document["categories"]}
        images = {one["id"]: one for one in document["images"]}
        found: dict[str, list[Mapping[str, Any]]] = {}
        for one in document["annotations"]:
            image = images[one["image_id"]]
            x, y, width, height = one["bbox"]
            sides = image["width"], image["height"]
            box = (x / sides[0], y / sides[1], width / sides[0], height / sides[1])
            row = {"category": names[one["category_id"]], "bbox": box,
                   "crowd": bool(one.get("iscrowd"))}  # fmt: skip
            found.setdefault(_image_name(image["file_name"]), []).append(row)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"--objects: {path} is not a COCO instances file: {type(error).__name__}: {error}"
        ) from error
    return {name: tuple(rows) for name, rows in found.items()}


def _counts_of(
    mentions: Sequence[Mention], present: Sequence[str], annotated: Mapping[str, int] | None
) -> dict[str, int]:
    """Returns the numbers that the prompt states.

    "a dog" states one only if the annotations confirm it: captions rarely name every object.
    """
    counts = {}
    for category in present:
        own = [mention for mention in mentions if mention.category == category]
        numbers = [mention.number for mention in own if mention.number is not None]
        total = sum(numbers)
        is_stated = not all(mention.is_article for mention in own)
        is_confirmed = annotated is not None and annotated.get(category) == total
        if len(numbers) == len(own) and (is_stated or is_confirmed):
            counts[category] = total
    return counts


def _relations_of_text(caption: str, mentions: Sequence[Mention]) -> list[Relation]:
    words = _words(caption)
    found = []
    for first, second in pairwise(mentions):
        between = words[first.end : second.start]
        if first.category == second.category or len(between) > RELATION_REACH:
            continue
        text, after = " ".join(between), " ".join(words[second.end : second.end + 3])
        for name, pattern in RELATION_WORDS.items():
            is_split = (
                re.search(rf"\bon the {name}\b", text) and after == f"on the {OPPOSITE[name]}"
            )
            if is_split or re.search(rf"\b(?:{pattern})\b", text):
                found.append(Relation(first=first.category, name=name, second=second.category))
                break
    return found


def _relations_of_boxes(
    present: Sequence[str], boxes: Mapping[str, Sequence[Box]], counts: Mapping[str, int]
) -> tuple[Relation, ...]:
    """Returns the relations of all pairs of expected categories with one object each."""
    single = [name for name in present if counts.get(name) == 1]
    return tuple(
        Relation(first=first, name=name, second=second)
        for number, first in enumerate(single)
        for second in single[number + 1 :]
        for name in sorted(relations_between(boxes[first][0], boxes[second][0]))
    )


def _without_repeats(relations: Iterable[Relation]) -> tuple[Relation, ...]:
    """Returns relations once each; of two that contradict each other, the first."""
    kept: list[Relation] = []
    for one in relations:
        reverse = Relation(first=one.second, name=OPPOSITE[one.name], second=one.first)
        contrary = Relation(first=one.first, name=OPPOSITE[one.name], second=one.second)
        turned = Relation(first=one.second, name=one.name, second=one.first)
        if not {one, reverse, contrary, turned} & {*kept}:
            kept.append(one)
    return tuple(kept)


def _number_of(words: Sequence[str], start: int, is_plural: bool) -> tuple[int | None, bool]:
    """Returns the number in front of a noun, and whether it is that of an article."""
    if words[start] in ALWAYS_PLURAL:
        return None, False
    fits_any = words[start] in SAME_PLURAL
    for back in range(start - 1, max(start - 2 - NUMBER_REACH, -1), -1):
        word = words[back]
        if word == "of" and back and words[back - 1] in ("couple", "pair"):
            return 2, False
        if word in ("a", "an"):
            return (None, False) if is_plural and not fits_any else (1, True)
        number = NUMBERS.get(word) or (int(word) if word.isdigit() and len(word) < 3 else None)
        if number:
            fits = fits_any or is_plural == (number > 1)
            return (number, False) if fits else (None, False)
        if word in BREAKS or _phrases().get((word,), (None, False))[1]:
            break  # "two men riding horses" states no number of horses
    return None, False


def _is_denied(words: Sequence[str], start: int) -> bool:
    return any(word in ("no", "without") for word in words[max(start - 2, 0) : start])


def _match(words: Sequence[str], index: int) -> tuple[int, str | None, bool]:
    """Returns length, category and whether it is plural, of the longest phrase at a word."""
    phrases = _phrases()
    for length in (3, 2, 1):
        found = phrases.get(tuple(words[index : index + length]))
        if found is not None and not _is_colour(words, index, length):
            return length, *found
    return 1, None, False


def _is_colour(words: Sequence[str], index: int, length: int) -> bool:
    """Returns whether "orange" stands in front of another word, as in "an orange cat"."""
    if tuple(words[index : index + length]) != ("orange",):
        return False
    after = (*words[index + 1 : index + 3], "", "")
    is_one_of_two = after[0] in ("and", "or") and after[1] in COLOURS
    return is_one_of_two or (after[0] != "" and after[0] not in BREAKS)


COLOURS = ("black", "white", "red", "green", "blue", "yellow", "brown", "grey", "gray", "pink")


@cache
def _phrases() -> dict[tuple[str, ...], tuple[str | None, bool]]:
    """Returns the category of each phrase, as words, and whether the phrase is a plural."""
    phrases: dict[tuple[str, ...], tuple[str | None, bool]] = {}
    for category, synonyms in SYNONYMS.items():
        for phrase in (category, *filter(None, synonyms.split(", "))):
            *before, last = phrase.split()
            phrases[(*before, _plural(last))] = (category, True)
            phrases[(*before, last)] = (category, last in ALWAYS_PLURAL)
    for phrase in NOT_OBJECTS.split(", "):
        *before, last = phrase.split()
        phrases[(*before, _plural(last))] = (NOT_OBJECTS_BUT.get(phrase), True)
        phrases[(*before, last)] = (NOT_OBJECTS_BUT.get(phrase), False)
    return phrases


def _plural(word: str) -> str:
    if word in PLURALS or word in ALWAYS_PLURAL:
        return PLURALS.get(word, word)
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _canonical(label: str) -> str:
    """Returns COCO's category, or the label itself if COCO has none."""
    return category_of(label) or label


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+|\d+|[,.;:]", text.lower().replace("'s ", " , "))
