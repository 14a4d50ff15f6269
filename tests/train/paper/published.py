"""Small files in the shapes, under the names and in the folders in which datasets are published.

write_all(data)      # all that the presets of the paper's runs read, videos and pictures drawn
"""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from preprocess.world import write_video

Json = dict[str, Any]
SIZE = (64, 48)
"""Width and height of drawn videos and pictures."""


def write_all(data: Path) -> None:
    write_st_align(data)
    write_charades(data)
    write_hc_stvg(data)
    write_vidstg(data)
    for name in ("refcoco", "refcoco+", "refcocog"):
        write_refcoco(data, name)
    write_llava_video(data)


# -- drawings


def draw_video(path: Path, frames: int, fps: int) -> None:
    """Write a video of a square that crosses it."""
    width, height = SIZE
    clip = np.full((frames, height, width, 3), 40, np.uint8)
    for frame in range(frames):
        left = round((width - 16) * frame / max(1, frames - 1))
        clip[frame, 16:32, left : left + 16] = (230, 60, 60)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, clip, fps)


def draw_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", SIZE, (40, 40, 40))
    picture.paste((230, 60, 60), (16, 12, 48, 36))
    picture.save(path)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def talk(asked: str, answered: str) -> list[Json]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]


# -- LLaVA-ST's own data: slots in the texts, their numbers in `variables`, parts in frames in `meta`


def variables(times: Sequence[float] = (), boxes: Sequence[Sequence[float]] = ()) -> Json:
    """Return the numbers of answers: shares of the clip, and boxes of shares of the frame."""
    empty = {
        f"{axis}_{side}_locations": []
        for axis in ("temporal", "spatial_height", "spatial_width")
        for side in ("input", "output")
    }
    return empty | {
        "temporal_output_locations": list(times),
        "spatial_width_output_locations": [x for box in boxes for x in (box[0], box[2])],
        "spatial_height_output_locations": [y for box in boxes for y in (box[1], box[3])],
    }


SPAN = "{<TEMP-OUTPUT><TEMP-OUTPUT>}"
BOX = "[<WIDTH-OUTPUT><HEIGHT-OUTPUT><WIDTH-OUTPUT><HEIGHT-OUTPUT>]"
VTIMELLM = {
    "id": "v1",
    "video": "vtimellm/v1.mp4",
    "conversations": talk("<video>\nWhen does a square move?", f" {SPAN} "),
    "variables": variables([0.25, 0.75]),
}
GRAND = {
    "id": "sa_1",
    "image": "grand/sa_1.jpg",
    "conversations": talk("<image>\nWhere is a square?", f" {BOX}"),
    "variables": variables(boxes=[[0.25, 0.25, 0.75, 0.75]]),
}
INTENTQA = {
    "id": "i1",
    "video": "intentqa/i1.mp4",
    "conversations": talk("<video>\nWhy does it move?\nA. to arrive\nB. to stay", "A. to arrive"),
}
STVG = {
    "id": "s1",
    "video": "2401075277.mp4",
    "meta": {"split": [20, 59], "width": 640, "height": 360},
    "conversations": talk(
        "<video>\nWhen does it move, and where is it?", f"{SPAN} <TEMP-OUTPUT>: {BOX}"
    ),
    "variables": variables([0.25, 0.75, 0.5], [[0.1, 0.2, 0.5, 0.6]]),
}


def write_st_align(data: Path) -> None:
    folder = data / "ST-Align-Dataset"
    caption = talk("<video>\nDescribe the video.", "A square moves to the right.")
    rows = [
        {"id": f"w{k}", "video": f"webvid/w{k}.mp4", "conversations": caption} for k in range(3)
    ]
    write_json(folder / "stage1" / "webvid.json", rows)
    write_json(folder / "stage2" / "vtimellm.json", [VTIMELLM])
    write_json(folder / "stage2" / "grand.json", [GRAND])
    write_json(folder / "stage3" / "intentqa_train.json", [INTENTQA])
    write_json(folder / "stage3" / "stvg.json", [STVG])
    for name in (*(row["video"] for row in rows), VTIMELLM["video"], INTENTQA["video"]):
        draw_video(data / "videos" / str(name), 24, 8)
    draw_video(data / "videos" / STVG["video"], 80, 10)
    draw_picture(data / "videos" / GRAND["image"])


# -- Charades-STA: lines of texts, times in seconds, some after the end of their video


CHARADES = (
    "AO8RW 0.0 1.9##a person is putting a book on a shelf.\nAO8RW 1.2 4.4##a person is smiling.\n"
)
"""Of a video of 3 seconds."""


def write_charades(data: Path) -> None:
    folder = data / "Charades-STA"
    folder.mkdir(parents=True)
    (folder / "charades_sta_train.txt").write_text(CHARADES)
    (folder / "charades_sta_test.txt").write_text("3MSZA 0.5 2.0##person turns on the light.\n")
    for name in ("AO8RW", "3MSZA"):
        draw_video(data / "Charades_v1_480" / f"{name}.mp4", 24, 8)


# -- HC-STVG: an object by videos of 20 seconds, a box for each frame; st_frame counts from 1


HC_STVG = {
    "bbox": [[64.0 + k, 36.0, 320.0, 180.0] for k in range(51)],
    "st_time": 5.0,
    "ed_time": 15.0,
    "st_frame": 26,
    "img_num": 100,
}
"""Of 5 frames a second: the first box is of frame 26, at 25 / 5 seconds, the last of 76, at 75 / 5."""
V1 = HC_STVG | {"width": 640, "height": 360, "caption": "The man in white walks to the car."}
V2 = HC_STVG | {"img_size": [360, 640], "English": "The man in white walks to the car."}


def write_hc_stvg(data: Path) -> None:
    folder = data / "HC-STVG"
    write_json(folder / "train_v2.json", {"10__Gvp-cj3bmIY.mp4": V2})
    write_json(folder / "val_v2.json", {"55_vfjywN5CN0Y.mp4": V1})
    for name in ("10__Gvp-cj3bmIY.mp4", "55_vfjywN5CN0Y.mp4"):
        draw_video(folder / "videos" / name, 100, 5)


# -- VidSTG and VidOR: frames from 0, `used_segment` with its last frame, `temporal_gt` without its end


VIDSTG = {
    "vid": "2401075277",
    "frame_count": 80,
    "fps": 10.0,
    "width": 640,
    "height": 360,
    "subject/objects": [{"tid": 0, "category": "child"}, {"tid": 1, "category": "ball"}],
    "used_segment": {"begin_fid": 20, "end_fid": 59},
    "used_relation": {
        **{"subject_tid": 0, "object_tid": 1, "predicate": "watch"},
        **{"begin_fid": 30, "end_fid": 50},
    },
    "temporal_gt": {"begin_fid": 30, "end_fid": 50},
    "captions": [{"description": "the child watches the ball.", "type": "person", "target_id": 0}],
    "questions": [{"description": "what does the child watch?", "type": "object", "target_id": 1}],
}


def vidor() -> Json:
    """Return VidOR's annotation: the child moves by a pixel a frame, the ball is seen in every other."""
    places = []
    for frame in range(80):
        child = {"xmin": 64 + frame, "ymin": 36, "xmax": 320 + frame, "ymax": 180}
        ball = {"xmin": 320, "ymin": 90, "xmax": 480, "ymax": 270}
        seen = [{"tid": 0, "bbox": child, "generated": 0, "tracker": "none"}]
        seen += [{"tid": 1, "bbox": ball, "generated": 0, "tracker": "none"}] * (frame % 2 == 0)
        places.append(seen)
    return {
        **{"version": "VERSION 1.0", "video_id": "2401075277", "video_hash": ""},
        **{"video_path": "0000/2401075277.mp4", "frame_count": 80, "fps": 10.0},
        **{"width": 640, "height": 360, "subject/objects": VIDSTG["subject/objects"]},
        **{"trajectories": places, "relation_instances": []},
    }


def write_vidstg(data: Path) -> None:
    annotations = data / "VidSTG-Dataset" / "annotations"
    write_json(annotations / "train_annotations.json", [VIDSTG])
    write_json(annotations / "test_annotations.json", [VIDSTG])
    folder = data / "vidor-dataset"
    write_json(folder / "annotation" / "training" / "0000" / "2401075277.json", vidor())
    draw_video(folder / "video" / "0000" / "2401075277.mp4", 80, 10)


# -- RefCOCO: a pickle of refs, whose file_name is of no file, and COCO's boxes


def instances() -> Json:
    return {
        "images": [
            {
                "id": 98304,
                "file_name": "COCO_train2014_000000098304.jpg",
                "width": 640,
                "height": 424,
            },
            {
                "id": 581857,
                "file_name": "COCO_train2014_000000581857.jpg",
                "width": 640,
                "height": 427,
            },
        ],
        "annotations": [
            {
                "id": 3007,
                "image_id": 98304,
                "bbox": [263.87, 216.88, 21.13, 15.17],
                "category_id": 18,
            },
            {"id": 1719310, "image_id": 581857, "bbox": [0, 0, 320, 213.5], "category_id": 1},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }


def ref(number: int, annotation: int, image: int, split: str, *sentences: str) -> Json:
    return {
        "ref_id": number,
        "ann_id": annotation,
        "image_id": image,
        "category_id": 1,
        "file_name": f"COCO_train2014_{image:012}_{number}.jpg",
        "split": split,
        "sent_ids": list(range(len(sentences))),
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": k, "sent": text}
            for k, text in enumerate(sentences)
        ],
    }


def write_refcoco(data: Path, name: str) -> None:
    parts = ("train", "val", "test") if name == "refcocog" else ("train", "val", "testA", "testB")
    found = [ref(0, 3007, 98304, "train", "small dog", "the dog on the left")]
    found += [ref(k, 1719310, 581857, part, "the lady") for k, part in enumerate(parts[1:], 1)]
    folder = data / name
    folder.mkdir(parents=True)
    by = "umd" if name == "refcocog" else "unc"
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(found, protocol=0))
    write_json(folder / "instances.json", instances())
    for image in instances()["images"]:
        draw_picture(data / "train2014" / image["file_name"])


# -- LLaVA-Video-178K: a folder for each length and source, `<image>` in texts about videos


def write_llava_video(data: Path) -> None:
    root = data / "LLaVA-Video-178K"
    for length in ("0_30_s", "30_60_s", "1_2_m", "2_3_m"):
        for source in ("academic", "youtube"):
            kinds = [f"{source}_v0_1_cap", f"{source}_oe_v0_1_qa", f"{source}_mc_v0_1_qa"]
            write_folder(root / f"{length}_{source}_v0_1", length, kinds, f"{source}_source")
        write_folder(root / f"{length}_nextqa", length, ["nextqa_oe_qa", "nextqa_mc_qa"], "NextQA")
        write_folder(
            root / f"{length}_activitynetqa", length, ["activitynetqa_oe_qa"], "activitynet"
        )
    for length in ("0_30_s", "30_60_s"):
        kinds = ["perceptiontest_mc_qa"]
        write_folder(root / f"{length}_perceptiontest", length, kinds, "perception_test")


def write_folder(folder: Path, length: str, kinds: Sequence[str], source: str) -> None:
    video = f"{source}/{length}-1.mp4"
    for kind in kinds:
        row = {
            "id": f"{length}-1",
            "conversations": talk("<image>\nPlease describe what moves.", "A square moves."),
            "data_source": folder.name,
            "video": video,
        }
        write_json(folder / f"{length}_{kind}_processed.json", [row])
    draw_video(folder / video, 16, 8)
