"""The web demo: a page to chat with a prefix, the base, or both side by side.

Nothing leaves the machine: no analytics, no share links, no remote fonts.
"""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ptuning.serve.session import BASE_NAME, UnknownPrefixError
from ptuning.serve.startup import check_guarded
from ptuning.serve.web_talk import (
    EMPTY,
    Panes,
    WebTalk,
    join_attributes,
    parse_attributes,
    take_back,
    to_messages,
)

TITLE = "ChatGLM P-Tuning v2"
EXAMPLES = [
    "类型#裤*版型#宽松*风格#简约*裤型#阔腿裤",
    "类型#裙*颜色#红色*版型#修身*裙长#长裙",
    "类型#上衣*材质#棉*颜色#白色*图案#条纹",
    "你好",
]
CONCURRENT_QUESTIONS = 8  # more wait in the queue
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
STYLE = Path(__file__).with_name("web.css")
ESCAPE_STOPS = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector("#stop:not([disabled])")?.click();
});
</script>
"""
# The opposite of web_talk's escaping: what is copied is the text that is shown.
COPY_IS_PLAIN = """
<script>
const copyText = navigator.clipboard?.writeText;
if (copyText) navigator.clipboard.writeText = (text) => copyText.call(
  navigator.clipboard, text.replaceAll("&lt;", "<").replaceAll("&amp;", "&"));
</script>
"""


class Controls:
    """The controls of the page, laid out from top to bottom."""

    def __init__(self, talk: WebTalk) -> None:
        model = talk.models[0]
        gr.Markdown(
            f"# {TITLE}\n选择前缀或基座模型 · Choose a prefix or the untouched base",
            elem_id="title",
        )
        with gr.Row(elem_id="models"):
            self.model = gr.Dropdown(
                talk.models, value=model, label="模型 Model", elem_id="model", filterable=False
            )
            self.other = gr.Dropdown(
                talk.models,
                value=BASE_NAME,
                label="对照 Compare with",
                elem_id="other",
                visible=False,
                filterable=False,
            )
            self.compare = gr.Checkbox(label="并排比较 Compare side by side", elem_id="compare")
        with gr.Row(elem_id="chats"):
            self.chats = (_chat(model, "chat", True), _chat(BASE_NAME, "other-chat", False))
        self.status = gr.Markdown(elem_id="status")
        with gr.Row(elem_id="ask"):
            self.question = gr.Textbox(
                label="输入 Question",
                placeholder="回车发送，Esc 停止 · Enter sends, Esc stops",
                lines=1,
                max_lines=6,
                autofocus=True,
                elem_id="question",
                scale=1,
            )
        with gr.Row(elem_id="buttons"):
            self.send = gr.Button("发送 Send", variant="primary", elem_id="send", min_width=80)
            self.stop = gr.Button(
                "停止 Stop", variant="stop", interactive=False, elem_id="stop", min_width=80
            )
            self.regenerate = gr.Button("重新生成 Regenerate", elem_id="regenerate", min_width=80)
            self.clear = gr.Button("清空 Clear", elem_id="clear", min_width=80)
        gr.Examples(EXAMPLES, inputs=self.question, label="示例 Examples", elem_id="examples")
        self.rows, self.add_row = _attribute_editor()
        self.sampling = _sampling(talk, model)
        self.panes = gr.State(EMPTY)


def _chat(label: str, name: str, visible: bool) -> gr.Chatbot:
    """Return one conversation; Markdown is off, since `*` separates attributes."""
    return gr.Chatbot(
        label=label,
        elem_id=name,
        visible=visible,
        height=380,
        min_width=280,
        render_markdown=False,
        buttons=["copy"],
        placeholder="",
    )


def _attribute_editor() -> tuple[gr.Dataframe, gr.Button]:
    with gr.Accordion("属性编辑 Attribute editor", open=True, elem_id="attributes"):
        rows = gr.Dataframe(
            headers=["属性 Key", "值 Value"],
            value=[list(row) for row in parse_attributes(EXAMPLES[0]) or ()],
            datatype="str",
            type="array",
            column_count=2,
            interactive=True,
            wrap=True,
            label="改动会写入输入框 · Edits change the question",
            elem_id="rows",
        )
        add_row = gr.Button("添加属性 Add an attribute", size="sm", elem_id="add-row")
    return rows, add_row


def _sampling(talk: WebTalk, model: str) -> tuple[gr.Slider, gr.Slider, gr.Slider, gr.Checkbox]:
    longest = talk.session.context_length // 2
    with gr.Accordion("采样 Sampling", open=False, elem_id="sampling"):
        with gr.Row():
            temperature = gr.Slider(
                0.0, 2.0, value=0.0, step=0.05, label="温度 Temperature (0: 贪心 greedy)"
            )
            top_p = gr.Slider(0.05, 1.0, value=1.0, step=0.05, label="Top-p")
            max_new_tokens = gr.Slider(
                1,
                longest,
                value=min(talk.trained_length(model), longest),
                step=1,
                label="最大长度 Max tokens",
                elem_id="max-tokens",
            )
        send_history = gr.Checkbox(
            value=talk.is_trained_on_chats(model),
            label="带上历史 Send earlier turns",
            elem_id="turns",
        )
    return temperature, top_p, max_new_tokens, send_history


class Page:
    """The events of the page; each returns values for the controls it is bound to.

    `asked` are model, compare, other, temperature, top_p, max_new_tokens and send_history.
    """

    def __init__(self, talk: WebTalk) -> None:
        self.talk = talk

    def send(
        self, request: gr.Request, question: str, panes: Panes, *asked: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Answer the question; an empty one changes nothing."""
        question = question.strip()
        if not question:
            yield _unchanged()
            return
        yield from self._stream(request, panes, question, asked)

    def regenerate(
        self, request: gr.Request, question: str, panes: Panes, *asked: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Answer the last question again, with the current model and sampling."""
        panes, last = take_back(panes, compare=asked[1])
        if not last:
            yield _unchanged()
            return
        for step in self._stream(request, panes, last, asked):
            yield (*step[:-1], question)  # keeps what is being typed

    def _stream(
        self, request: gr.Request, panes: Panes, question: str, asked: Sequence[Any]
    ) -> Iterator[tuple[Any, ...]]:
        """Yield panes, both chats, status, send, stop, and the emptied question."""
        model, compare, other, temperature, top_p, max_new_tokens, send_history = asked
        models = [model, other] if compare else [model]
        try:
            for step in self.talk.ask(
                str(request.session_hash),
                panes,
                question,
                models,
                send_history=send_history,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=int(max_new_tokens),
            ):
                yield (
                    step.panes,
                    *(
                        to_messages(turns, self.talk.cards, finished=step.finished)
                        for turns in step.panes
                    ),
                    step.status,
                    gr.update(interactive=step.finished),
                    gr.update(interactive=not step.finished),
                    "",
                )
        except (ValueError, UnknownPrefixError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def stop(self, request: gr.Request) -> None:
        """Stop this visitor's answer, which ends its stream."""
        self.talk.stop(str(request.session_hash))

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """Stop and start a new conversation; what is being typed stays."""
        self.stop(request)
        return EMPTY, [], [], "", gr.update(interactive=True), gr.update(interactive=False)

    def pick(self, model: str) -> tuple[Any, ...]:
        """Return the name above the conversation, and length and history as in training."""
        talk = self.talk
        label = gr.update(label=model)
        return label, talk.trained_length(model), talk.is_trained_on_chats(model)


def _unchanged() -> tuple[Any, ...]:
    """Return no change for each output of send and regenerate."""
    return tuple(gr.skip() for _ in range(7))


def show_rows(question: str, rows: Sequence[Sequence[Any]]) -> Any:
    """Return the attributes in the question as a table; no change if it is no list of attributes.

    Nor if the table shows the same already: a row in it may be incomplete.
    """
    parsed = parse_attributes(question)
    shown = [(str(key).strip(), str(value).strip()) for key, value in rows if key and value]
    if parsed is None or shown == parsed:
        return gr.skip()
    return [list(row) for row in parsed]


def show_question(rows: Sequence[Sequence[Any]]) -> str:
    """Return the attributes of the table as a question."""
    try:
        return join_attributes(rows)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def build_page(talk: WebTalk) -> gr.Blocks:
    """Return the page, not served yet."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        page = Page(talk)
        _bind(page, Controls(talk))
        blocks.unload(page.stop)
    return blocks


def _bind(page: Page, c: Controls) -> None:
    """Connect the events."""
    shown = [c.panes, *c.chats, c.status, c.send, c.stop]
    asked = [c.question, c.panes, c.model, c.compare, c.other, *c.sampling]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    sending = gr.on(
        [c.question.submit, c.send.click],
        page.send,
        asked,
        [*shown, c.question],
        trigger_mode="once",
        **quiet,
    )
    again = c.regenerate.click(
        page.regenerate, asked, [*shown, c.question], trigger_mode="once", **quiet
    )
    c.stop.click(page.stop, queue=False, **quiet)
    gr.on(
        [c.clear.click, *(chat.clear for chat in c.chats)],
        page.clear,
        outputs=shown,
        cancels=[sending, again],
        queue=False,
        **quiet,
    )
    c.model.change(
        page.pick, c.model, [c.chats[0], c.sampling[2], c.sampling[3]], queue=False, **quiet
    )
    c.other.change(lambda name: gr.update(label=name), c.other, c.chats[1], queue=False, **quiet)
    c.compare.change(
        lambda on: [gr.update(visible=on)] * 2,
        c.compare,
        [c.other, c.chats[1]],
        queue=False,
        **quiet,
    )
    c.question.change(show_rows, [c.question, c.rows], c.rows, queue=False, **quiet)
    c.add_row.click(lambda rows: [*rows, ["", ""]], c.rows, c.rows, queue=False, **quiet)
    c.rows.input(show_question, c.rows, c.question, queue=False, **quiet)


def launch(blocks: gr.Blocks, *, host: str, port: int, password: str | None, wait: bool) -> str:
    """Serve the page and return its address; wait returns only after Ctrl-C."""
    check_guarded(host, password, flag="--password")

    def is_known(user: str, given: str) -> bool:
        return secrets.compare_digest(given.encode(), str(password).encode())

    blocks.queue(default_concurrency_limit=CONCURRENT_QUESTIONS)
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            auth=None if password is None else is_known,
            auth_message="任意用户名，加上密码。 Any user name, and the password.",
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
            css_paths=STYLE,
            head=ESCAPE_STOPS + COPY_IS_PLAIN,
        )
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}, most likely because another program does; give "
            "another port with --port."
        ) from error
    if wait:
        blocks.block_thread()
    return str(address)
