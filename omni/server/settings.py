"""Everything that a server can be told about what it accepts: who may ask, what is fetched, and every limit."""

from __future__ import annotations

import msgspec

from omni.server.access import ApiKey


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one server. The defaults suit a server on this machine that nobody else reaches."""

    # Who may ask
    api_keys: tuple[ApiKey, ...] = ()
    """Keys that a request must carry one of; none: whoever reaches the server may use it. See `parse_api_keys`."""
    cors_origins: tuple[str, ...] = ()
    """Origins (`https://studio.example`) whose pages may call this server; `*` for all. Others are refused."""
    trusted_hosts: tuple[str, ...] = ()
    """Names under which the server is reached (`Host` header, without port; `*.example.com` works, and `[ip]` for any
    IP address); none: any. `omni serve` sets them where no API key is needed, so that no web page reaches the server
    through a name of its own making."""
    public_url: str = ""
    """Address that clients see, for links in answers (`https://images.example/omni`); empty: the request's own."""

    # What is fetched for a client
    allowed_hosts: tuple[str, ...] = ()
    """Hosts from which media are fetched (`host`, `host:port`, `*.host`, `*`); none: no URL is fetched."""
    webhook_hosts: tuple[str, ...] = ()
    """Hosts to which webhooks are sent, written the same way; none: webhooks are refused."""
    fetch_seconds: float = 20.0
    """Time for one fetch, redirects and all."""

    # The request as bytes
    max_body_bytes: int = 64 * 1024**2
    max_header_bytes: int = 32 * 1024
    """Request line and headers together."""
    header_seconds: float = 10.0
    """Time for the request line and headers."""
    body_seconds: float = 30.0
    """Time for a body, on top of what it takes at `min_body_rate`."""
    min_body_rate: int = 64 * 1024
    """Bytes per second that a slow client must reach."""
    write_seconds: float = 60.0
    """Time in which a client must read the next 64 KiB of an answer, or all that is left; else it is cut off."""
    keep_alive_seconds: float = 15.0
    """How long an idle connection stays open."""
    max_connections: int = 2048
    max_files: int = 16
    """Files in one multipart body."""
    max_fields: int = 128
    """Other parts of one multipart body."""
    max_field_bytes: int = 16 * 1024**2
    """Size of one part that is no file; a data URL may be one."""
    max_json_depth: int = 32
    """Brackets inside brackets in a JSON body."""
    max_json_items: int = 100_000
    """Values in a JSON body, counted by its commas and opening brackets."""
    allow_unknown_fields: bool = False
    """Ignore fields that no graph input and no known parameter is named like, instead of refusing them."""

    # What is asked for
    max_text_chars: int = 200_000
    """Length of one text input."""
    max_n: int = 10
    """Pictures of one request."""
    max_steps: int = 1000
    """`num_inference_steps` of one request."""
    max_output_pixels: int = 16 * 1024**2
    """Width times height of what is drawn."""
    max_made_pixels: int = 1024**3
    """Width times height times frames times pictures of what one request makes."""
    max_output_frames: int = 2048
    """Frames of a clip that is drawn."""
    max_output_seconds: float = 300.0
    """Length of a clip or sound that is made."""
    request_seconds: float = 3600.0
    """Time for a synchronous request, waiting included."""

    # Media that a request brings
    max_media: int = 16
    """Pictures, clips, sounds and tensors of one request."""
    max_media_bytes: int = 48 * 1024**2
    """Size of one encoded picture, clip, sound or tensor."""
    max_pixels: int = 16 * 1024**2
    """Width times height of one picture, or of one frame of a clip."""
    max_side: int = 16_384
    """Width or height of one picture or clip."""
    max_frames: int = 1024
    """Frames of one clip."""
    max_request_pixels: int = 64 * 1024**2
    """Pixels of all pictures of one request."""
    max_decoded_bytes: int = 1024**3
    """Size of one decoded clip or sound, and of all media of one request."""
    max_held_bytes: int = 4 * 1024**3
    """Decoded media of all requests that wait, run, or are answered; beyond, requests with media get 503."""
    decode_seconds: float = 60.0
    """Time to decode one clip or sound."""
    max_decoders: int = 4
    """Media that are decoded at the same time."""
