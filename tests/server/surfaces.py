"""Bodies of requests with one image, in the shape of each endpoint."""

from .conftest import NAME

WHAT = "What is this?"


def anthropic(server, *parts, **fields):
    """The same messages in Anthropic's shape."""

    def source(url):
        return {"type": "base64", "media_type": "image/jpeg", "data": url.split(",")[1]}

    content = [
        {"type": "image", "source": source(server.pictures[part])}
        if part in server.pictures
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4,
        **fields,
    }


def responses(server, *parts):
    content = [
        {"type": "input_image", "image_url": server.pictures[part], "detail": "auto"}
        if part in server.pictures
        else {"type": "input_text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def chat(server, **fields):
    return {
        "model": NAME,
        "messages": server.messages("chelsea", WHAT),
        "max_tokens": 4,
        "temperature": 0,
        **fields,
    }


# Per surface: path, body of a one-image request, and where the answer counts prompt tokens.
SURFACES = {
    "chat": ("/v1/chat/completions", chat, lambda j: j["usage"]["prompt_tokens"]),
    "batch": (
        "/v1/chat/completions/batch",
        lambda s, **f: {**chat(s, **f), "messages": [s.messages("chelsea", WHAT)]},
        lambda j: j["usage"]["prompt_tokens"],
    ),
    "responses": (
        "/v1/responses",
        lambda s, **f: {
            "model": NAME,
            "input": responses(s, "chelsea", WHAT),
            "max_output_tokens": 4,
            **f,
        },
        lambda j: j["usage"]["input_tokens"],
    ),
    "messages": (
        "/v1/messages",
        lambda s, **f: anthropic(s, "chelsea", WHAT, **f),
        lambda j: sum(
            j["usage"][k]
            for k in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        ),
    ),
    "count_tokens": (
        "/v1/messages/count_tokens",
        lambda s, **f: anthropic(s, "chelsea", WHAT, **f),
        lambda j: j["input_tokens"],
    ),
    "tokenize": ("/tokenize", chat, lambda j: j["count"]),
    "render": ("/v1/chat/completions/render", chat, lambda j: len(j["token_ids"])),
    "responses render": (
        "/v1/responses/render",
        lambda s, **f: {"model": NAME, "input": responses(s, "chelsea", WHAT), **f},
        lambda j: len(j["token_ids"]),
    ),
    "messages render": (
        "/v1/messages/render",
        lambda s, **f: anthropic(s, "chelsea", WHAT, **f),
        lambda j: len(j["token_ids"]),
    ),
}
