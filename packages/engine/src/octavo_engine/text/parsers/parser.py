"""OutputParser: finds reasoning and tool calls in a model's text while it comes."""

from __future__ import annotations

from collections.abc import Iterable

from octavo_engine.text.parsers import calls
from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.parsers.calls import NoCall
from octavo_engine.text.parsers.events import CallBegin, Event, Reasoning
from octavo_engine.text.parsers.formats import ReasoningFormat, ToolFormat
from octavo_engine.text.parsers.reader import Reading


class OutputParser(AnswerParser):
    """Reads answers with marked reasoning and one format of calls.

    Text that begins like a call and is none is content: nothing that the model wrote is lost but markers, and white
    space beside them.

    Args:
        tools: how calls are written; None looks for none.
        reasoning: how reasoning is marked; None looks for none.
        names: of the functions that there are; where a text without marker begins like a call, it has to be of one.
        starts_in_reasoning: whether the prompt has ended with the marker that begins reasoning.
        max_num_calls: calls behind that are left out; None takes all.

    Example:
        >>> from octavo_engine.text.parsers.formats import TOOL_FORMATS
        >>> parser = OutputParser(TOOL_FORMATS["hermes"])
        >>> parser.push('So: <tool_call>{"name": "f", "argum') + parser.push('ents": {"a": 1}}</tool_call>')
        [Content(text='So:'), CallBegin(name='f'), CallArguments(text='{'), ...]
    """

    def __init__(
        self,
        tools: ToolFormat | None = None,
        reasoning: ReasoningFormat | None = None,
        *,
        names: Iterable[str] = (),
        starts_in_reasoning: bool = False,
        max_num_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._names = frozenset(names)
        self._starts_in_reasoning = starts_in_reasoning
        self._max_num_calls = max_num_calls
        self._num_calls = 0
        super().__init__()

    def _read(self) -> Reading[None]:
        if self._reasoning is not None:
            yield from self._read_reasoning(self._reasoning)
        if self._tools is not None:
            yield from self._read_answer(self._tools)
        yield from self._reader.rest(self._put_content)

    def _read_reasoning(self, form: ReasoningFormat) -> Reading[None]:
        if not self._starts_in_reasoning:
            space = yield from self._reader.skip_space()
            if not (yield from self._reader.skip(form.begin)):
                self._put_content(space)
                return
        yield from self._reader.skip_space()
        yield from self._reader.until((form.end,), lambda text: self._put(Reasoning(text)))
        yield from self._reader.skip_space()

    def _read_answer(self, form: ToolFormat) -> Reading[None]:
        if form.bare:
            space = yield from self._reader.skip_space()
            if (yield from self._reader.peek()) in _OPENS_CALL[form.form]:
                yield from self._read_calls(form, space, self._names)
            else:
                self._put_content(space)
        if not form.begins:
            return
        while (marker := (yield from self._reader.until(form.begins + form.ends, self._put_content))) is not None:
            if marker in form.begins:
                yield from self._read_calls(form, marker, None)

    def _read_calls(self, form: ToolFormat, lead: str, known: frozenset[str] | None) -> Reading[None]:
        """Read calls up to their end, or to what is none: that is content, with what led to it if it is the first."""
        while True:
            passed = yield from self._skip_between(form)
            if (yield from self._skip_end(form)):
                return
            try:
                yield from self._read_call(form, known)
            except NoCall as error:
                self._put_content(lead + passed + error.text)
                return
            lead = ""
            passed = yield from self._skip_between(form)
            if not form.ends and (yield from self._reader.peek()) not in _OPENS_CALL[form.form]:
                return

    def _read_call(self, form: ToolFormat, known: frozenset[str] | None) -> Reading[None]:
        """Read one call, or one list of calls.

        Raises:
            NoCall: if something else comes.
        """
        opens_json = (yield from self._reader.peek()) in _OPENS_CALL["json"]
        if form.form == "python":
            yield from calls.python_calls(self._reader, self._put_call, known=known)
        elif form.form == "named" and not opens_json:
            yield from calls.named_call(self._reader, self._put_call, form.call_name)
        else:
            yield from calls.json_calls(self._reader, self._put_call, known=known)

    def _skip_between(self, form: ToolFormat) -> Reading[str]:
        """Take and return white space and separators."""
        passed = yield from self._reader.skip_space()
        while (separator := (yield from self._reader.skip_any(form.separators))) is not None:
            passed += separator + (yield from self._reader.skip_space())
        return passed

    def _skip_end(self, form: ToolFormat) -> Reading[bool]:
        """Take what closes calls, if it comes; say whether calls have ended with it, or with the text."""
        if (yield from self._reader.skip_any(form.ends)) is not None:
            return True
        ahead = yield from self._reader.peek(max(map(len, form.ends), default=1))
        if ahead and not any(end.startswith(ahead) for end in form.ends):
            return False
        yield from self._reader.take(len(ahead))  # a text that was cut off within a mark, or before it
        return True

    def _put_call(self, event: Event) -> None:
        """Put out a part of a call, unless it is one too many."""
        if isinstance(event, CallBegin):
            self._num_calls += 1
        if self._max_num_calls is None or self._num_calls <= self._max_num_calls:
            self._put(event)


_OPENS_CALL = {"json": ("{", "["), "named": (), "python": ("[",)}
