"""Hostile requests: JSON, and the values in it."""

from __future__ import annotations

from tests.server.hostile import CHAT, IMAGES, NUMBERS, PAINTER_TAKES, SPEECH, Case, draw, film, make, send

CASES = (
    Case(
        "text without an end",
        send(CHAT, b"[]" * 33 + b'"' + b'\\"' * 100_000),
        400,
        "the body is not JSON: Extra data, line 1, column 3",
    ),
    Case(
        "body of text",
        send(IMAGES, "{}", {"Content-Type": "text/plain"}),
        415,
        "the body is 'text/plain'; send application/json or multipart/form-data",
    ),
    Case(
        "body of XML",
        send(IMAGES, "<a/>", {"Content-Type": "application/xml"}),
        415,
        "the body is 'application/xml'; send application/json or multipart/form-data",
    ),
    Case(
        "body of junk type",
        send(IMAGES, "{}", {"Content-Type": "\xff\xfe"}),
        415,
        "the body is '\\xff\\xfe'; send application/json or multipart/form-data",
    ),
    Case(
        "packed body",
        send(IMAGES, b"\x1f\x8b\x08", {"Content-Encoding": "gzip"}),
        400,
        "the body is not UTF-8 text, at byte 1",
    ),
    Case("empty", send(IMAGES, b""), 400, "the body is not JSON: Expecting value, line 1, column 1"),
    Case(
        "not json",
        send(IMAGES, b"{'a': 1}"),
        400,
        "the body is not JSON: Expecting property name enclosed in double quotes, line 1, column 2",
    ),
    Case("trailing", send(IMAGES, b"{} {}"), 400, "the body is not JSON: Extra data, line 1, column 4"),
    Case("list", send(IMAGES, []), 400, "the body must be a JSON object, not a list"),
    Case("null", send(IMAGES, b"null"), 400, "the body must be a JSON object, not null"),
    Case("NaN", send(IMAGES, b'{"prompt": NaN}'), 400, f"the body has the number NaN, {NUMBERS}"),
    Case(
        "Infinity",
        send(IMAGES, b'{"prompt":"x","guidance_scale": Infinity}'),
        400,
        f"the body has the number Infinity, {NUMBERS}",
    ),
    Case(
        "number too large",
        send(IMAGES, b'{"prompt":"x","guidance_scale": 1e999}'),
        400,
        f"the body has the number 1e999, {NUMBERS}",
    ),
    Case(
        "deep JSON",
        send(IMAGES, b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        400,
        "the body has brackets inside brackets, more than 32 deep",
    ),
    Case(
        "JSON of brackets", send(IMAGES, b"[" * 90000), 400, "the body has brackets inside brackets, more than 32 deep"
    ),
    Case("field twice", send(IMAGES, b'{"prompt":"a","prompt":"b"}'), 400, "the body has the field 'prompt' twice"),
    Case("bad UTF-8", send(IMAGES, b'{"prompt":"\xff"}'), 400, "the body is not UTF-8 text, at byte 11"),
    Case(
        "half a surrogate pair",
        send(IMAGES, b'{"prompt":"\\ud800"}'),
        400,
        "the body has half a surrogate pair (\\ud800 to \\udfff), which is no character",
    ),
    Case(
        "huge int",
        send(IMAGES, b'{"n":' + b"9" * 5000 + b"}"),
        400,
        f"the body has the number 9999999999999999999999999999999999999999, {NUMBERS}",
    ),
    Case(
        "byte order mark",
        send(IMAGES, b"\xef\xbb\xbf{}"),
        400,
        "the body is not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig), line 1, column 1",
    ),
    Case("UTF-16", send(IMAGES, '{"prompt":"x"}'.encode("utf-16")), 400, "the body is not UTF-8 text, at byte 0"),
    Case(
        "many values",
        send(IMAGES, b'{"a":[' + b"0," * 120000 + b"0]}"),
        400,
        "the body has more than 100000 JSON values, the limit of this server",
    ),
    Case("NUL in a prompt", draw(prompt="a\x00b"), 200, None),
    Case(
        "field __proto__",
        send(IMAGES, {"__proto__": {}, "prompt": "x", "model": "painter"}),
        400,
        f"unknown parameter '__proto__' {PAINTER_TAKES}",
    ),
    Case(
        "field __class__",
        send(IMAGES, {"__class__": 1, "prompt": "x", "model": "painter"}),
        400,
        f"unknown parameter '__class__' {PAINTER_TAKES}",
    ),
    Case(
        "field self",
        send(IMAGES, {"self": 1, "graph": 2, "prompt": "x", "model": "painter"}),
        400,
        f"unknown parameter 'self' {PAINTER_TAKES}",
    ),
    Case("n huge", draw(n=10**9), 400, "'n' must be at most 10, not 1000000000"),
    Case("n zero", draw(n=0), 400, "'n': expected `int` >= 1"),
    Case("n negative", draw(n=-1), 400, "'n': expected `int` >= 1"),
    Case("n float", draw(n=1.5), 400, "'n': expected `int`, got `float`"),
    Case("n text", draw(n="2"), 400, "'n': expected `int`, got `str`"),
    Case("n bool", draw(n=True), 400, "'n': expected `int`, got `bool`"),
    Case("n list", draw(n=[1]), 400, "'n': expected `int`, got `array`"),
    Case("size huge", draw(size="99999x99999"), 400, "'width' must be at most 16384, not 99999"),
    Case("size zero", draw(size="0x16"), 400, "size 0x16 has no pixels"),
    Case("size negative", draw(size="-1x16"), 400, "size '-1x16' must be WIDTHxHEIGHT in pixels, or auto"),
    Case(
        "size junk",
        draw(size="1024x1024; rm -rf /"),
        400,
        "size '1024x1024; rm -rf /' must be WIDTHxHEIGHT in pixels, or auto",
    ),
    Case("size type", draw(size=1024), 400, "'size': expected `str`, got `int`"),
    Case(
        "size unicode",
        draw(size="\u0661\u0662x16"),
        400,
        "size '\\u0661\\u0662x16' must be WIDTHxHEIGHT in pixels, or auto",
    ),
    Case("width huge", draw(width=10**7, height=1), 400, "'width' must be at most 16384, not 1e+07"),
    Case("area", draw(width=16000, height=16000), 400, "16000x16000 are 256000000 pixels; at most 16777216 are drawn"),
    Case("steps huge", draw(num_inference_steps=10**6), 400, "'num_inference_steps' must be at most 1000, not 1e+06"),
    Case("steps 0", draw(num_inference_steps=0), 400, "'num_inference_steps': expected `int` >= 1"),
    Case("steps nan text", draw(num_inference_steps="NaN"), 400, "'num_inference_steps': expected `int`, got `str`"),
    Case("seed neg", draw(seed=-1), 400, "seed must be a whole number from 0 to 4294967295, not -1"),
    Case(
        "seed huge",
        draw(seed=2**63 - 1),
        400,
        "seed must be a whole number from 0 to 4294967295, not 9223372036854775807",
    ),
    Case("seed float", draw(seed=0.5), 400, "'seed': expected `int | null`, got `float`"),
    Case("unknown", draw(cheese=1), 400, f"unknown parameter 'cheese' {PAINTER_TAKES}"),
    Case("misspelt", draw(promt="x"), 400, f"unknown parameter 'promt', did you mean 'prompt'? {PAINTER_TAKES}"),
    Case("prompt type", draw(prompt={"a": 1}), 400, "input 'prompt' must be text, not dict"),
    Case(
        "prompt null",
        send(IMAGES, {"model": "painter", "prompt": None}),
        400,
        "input 'prompt' is missing: stage 'work' needs it",
    ),
    Case("prompt long", draw(prompt="x" * 250000), 400, "'prompt' has 250000 characters; at most 200000 are read"),
    Case("format", draw(output_format="exe"), 400, "'output_format': invalid enum value 'exe'"),
    Case("compression", draw(output_compression=101), 400, "'output_compression': expected `int` <= 100"),
    Case("response_format", draw(response_format="file"), 400, "'response_format': invalid enum value 'file'"),
    Case("extra_body type", draw(extra_body="x"), 400, "'extra_body': expected `object`, got `str`"),
    Case(
        "too many partial images", draw(partial_images=100, stream=True), 400, "'partial_images': expected `int` <= 3"
    ),
    Case(
        "steps in extra",
        draw(extra_body={"num_inference_steps": 10**6}),
        400,
        "'num_inference_steps' must be at most 1000, not 1e+06",
    ),
    Case(
        "chat n",
        send(CHAT, {"model": "echo", "n": 10**6, "messages": [{"role": "user", "content": "x"}]}),
        400,
        "'n' must be at most 10, not 1000000",
    ),
    Case(
        "chat role",
        send(CHAT, {"model": "echo", "messages": [{"role": "root", "content": "x"}]}),
        400,
        "'messages[0].role': invalid enum value 'root'",
    ),
    Case(
        "chat none", send(CHAT, {"model": "echo", "messages": []}), 400, "'messages': expected `array` of length >= 1"
    ),
    Case(
        "chat content",
        send(CHAT, {"model": "echo", "messages": [{"role": "user", "content": {"a": 1}}]}),
        400,
        "'messages[0].content': expected `str | array | null`, got `object`",
    ),
    Case(
        "chat part",
        send(
            CHAT,
            {"model": "echo", "messages": [{"role": "user", "content": [{"type": "file", "file": "/etc/passwd"}]}]},
        ),
        400,
        "'messages[0].content[0].type': invalid value 'file'",
    ),
    Case(
        "chat image file",
        send(
            CHAT,
            {
                "model": "painter",
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "x"},
                            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
                        ],
                    }
                ],
            },
        ),
        400,
        "this graph takes no pictures: its messages hold text alone",
    ),
    Case(
        "chat wrong graph",
        send(CHAT, {"model": "singer", "messages": [{"role": "user", "content": "x"}]}),
        400,
        "graph 'singer' gives no text or image; these do: echo, painter, retoucher",
    ),
    Case("video frames", film(num_frames=10**8), 400, "'num_frames' must be at most 2048, not 1e+08"),
    Case("video seconds", film(seconds="1e9"), 400, "'seconds': expected `float`, got `str`"),
    Case(
        "audio seconds",
        send(SPEECH, {"model": "singer", "input": "x", "seconds": 10**9}),
        400,
        "'seconds' must be at most 300 s, not 1e+09",
    ),
    Case(
        "speed", send(SPEECH, {"model": "singer", "input": "x", "speed": 0.0}), 400, "'speed': expected `float` >= 0.25"
    ),
    Case("priority", make("echo", {"inputs": {}, "priority": 10**9}), 400, "'priority': expected `int` <= 100"),
    Case("preview neg", make("echo", {"inputs": {}, "preview_every": -1}), 400, "'preview_every': expected `int` >= 0"),
    Case("job unknown", make("echo", {"inputs": {}, "x": 1}), 400, "Object contains unknown field `x`"),
    Case("job inputs list", make("echo", {"inputs": []}), 400, "'inputs': expected `object`, got `array`"),
    Case(
        "job input unknown",
        make("echo", {"inputs": {"prompt": "x", "shell": "rm"}}),
        400,
        "unknown input 'shell' (this graph takes: prompt)",
    ),
    Case("job input missing", make("echo", {"inputs": {}}), 400, "input 'prompt' is missing: stage 'work' needs it"),
)
