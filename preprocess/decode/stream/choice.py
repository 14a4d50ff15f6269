"""Choose the video stream of an open file, and its decoder.

Never a cover, a thumbnail, a tile of a larger picture, nor the grey plane that holds another stream's
transparency, depth or gain: not even where nothing else can be decoded.
"""

from typing import Any

SECONDARY_MARKS = ("attached_pic", "timed_thumbnails", "still_image", "dependent")
"""FFmpeg's dispositions of streams that accompany another one; PyAV may not know all of them."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""By codec: decoders that return the transparency of WebM, which FFmpeg's own drop."""


def moving(container: Any) -> list[Any]:
    """Return the streams that may be chosen, in the order of the file."""
    streams = [s for s in container.streams.video if s.codec_context and not _is_marked(s)]
    for goes_with in (_is_plane, _is_single):
        streams = [stream for stream in streams if not goes_with(stream, streams)]
    return streams


def chosen(container: Any) -> Any:
    """Return FFmpeg's best among the streams that may be chosen; None if there is none."""
    streams = moving(container)
    try:
        best = container.streams.best("video")
    except IndexError:  # a stream that PyAV had not seen when it opened the file
        best = None
    # FFmpeg rates a cover best where the video is small or of an unknown codec.
    found = [stream for stream in streams if best is not None and stream.index == best.index]
    return next(iter(found or streams), None)


def _is_marked(stream: Any) -> bool:
    from av.stream import Disposition

    marks = [getattr(Disposition, name, 0) for name in SECONDARY_MARKS]
    return any(stream.disposition & mark for mark in marks if mark)


def _is_plane(stream: Any, streams: list[Any]) -> bool:
    """Return whether a stream is grey while others are in colour."""
    grey = [str(other.codec_context.pix_fmt).startswith("gray") for other in streams]
    return not all(grey) and str(stream.codec_context.pix_fmt).startswith("gray")


def _is_single(stream: Any, streams: list[Any]) -> bool:
    """Return whether a stream has one picture while others have several: a motion photo's still."""
    return stream.frames == 1 and any(other.frames != 1 for other in streams)


def decoder_of(stream: Any) -> Any:
    """Return a decoder of a stream that keeps its transparency, with one thread."""
    import av

    context = stream.codec_context
    name = ALPHA_DECODERS.get(context.codec.canonical_name, "")
    if not has_alpha_beside(stream) or name not in av.codecs_available:
        return context
    decoder = av.CodecContext.create(name, "r")
    decoder.thread_count = 1
    return decoder


def has_alpha_beside(stream: Any) -> bool:
    """Return whether a stream's transparency is stored apart from its pictures, as in WebM."""
    return str(stream.metadata.get("alpha_mode")) == "1"


def has_alpha(format_: Any) -> bool:
    """Return whether pixels of a format (PyAV's `VideoFormat`) may be transparent."""
    return format_.has_palette or any(part.is_alpha for part in format_.components)
