"""Which video stream of an open file is meant, and what decodes it.

Never a cover, a thumbnail, a tile of a larger picture, nor the plane of grey that holds another
stream's transparency, depth or gain: not even where nothing else can be decoded.
"""

from typing import Any

BESIDE = ("attached_pic", "timed_thumbnails", "still_image", "dependent")
"""FFmpeg's marks of streams that only go with another one; PyAV may not know all of them."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave the transparency of WebM away."""


def moving(container: Any) -> list[Any]:
    """Return the streams that may be meant, in the order of the file."""
    streams = [s for s in container.streams.video if s.codec_context and not _is_marked(s)]
    for goes_with in (_is_plane, _is_single):
        streams = [stream for stream in streams if not goes_with(stream, streams)]
    return streams


def chosen(container: Any) -> Any:
    """Return FFmpeg's best of the streams that may be meant, None where there is none."""
    streams = moving(container)
    try:
        best = container.streams.best("video")
    except IndexError:  # a stream that PyAV had not seen when it opened the file
        best = None
    # FFmpeg holds a cover for best where the video is small or of an unknown codec.
    found = [stream for stream in streams if best is not None and stream.index == best.index]
    return next(iter(found or streams), None)


def _is_marked(stream: Any) -> bool:
    from av.stream import Disposition

    marks = [getattr(Disposition, name, 0) for name in BESIDE]
    return any(stream.disposition & mark for mark in marks if mark)


def _is_plane(stream: Any, streams: list[Any]) -> bool:
    """Whether a stream is grey beside others in colour."""
    grey = [str(other.codec_context.pix_fmt).startswith("gray") for other in streams]
    return not all(grey) and str(stream.codec_context.pix_fmt).startswith("gray")


def _is_single(stream: Any, streams: list[Any]) -> bool:
    """Whether a stream is one picture beside others of several, as a motion photo's still is."""
    return stream.frames == 1 and any(other.frames != 1 for other in streams)


def decoder_of(stream: Any) -> Any:
    """Return what decodes a stream with its transparency."""
    import av

    context = stream.codec_context
    name = ALPHA_DECODERS.get(context.codec.canonical_name, "")
    if not has_alpha_beside(stream) or name not in av.codecs_available:
        return context
    decoder = av.CodecContext.create(name, "r")
    decoder.thread_count = 1
    return decoder


def has_alpha_beside(stream: Any) -> bool:
    """Whether a stream's transparency lies beside its pictures, as in WebM."""
    return str(stream.metadata.get("alpha_mode")) == "1"


def has_alpha(format_: Any) -> bool:
    """Whether pixels of a format may be transparent: PyAV's `VideoFormat`."""
    return format_.has_palette or any(part.is_alpha for part in format_.components)
