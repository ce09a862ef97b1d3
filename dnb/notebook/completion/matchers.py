"""Matchers for IPython's completer, thus for Lab, Notebook and terminal: each answers alone, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

from dnb.errors import USER_ERRORS, summary_of
from dnb.notebook.completion.public_names import attributes_at
from dnb.notebook.completion.typed_lines import TypedLine, read_typed

log = logging.getLogger(__name__)

Matcher = Callable[[CompletionContext], SimpleMatcherResult]


def register_matchers(shell: Any) -> None:
    """Have a shell's completer ask about lines of `%dtrain` and names of dnb, once or again."""
    completer = getattr(shell, "Completer", None)
    if completer is None:  # a shell that nobody types into
        return
    made = [_line_matcher(shell), _attribute_matcher(shell)]
    replaced = {_identifier(matcher) for matcher in made}
    others = [matcher for matcher in completer.custom_matchers if _identifier(matcher) not in replaced]
    completer.custom_matchers = [*others, *made]


def _line_matcher(shell: Any) -> Matcher:
    def match(context: CompletionContext) -> SimpleMatcherResult:
        text = _text_before(context)
        if (typed := read_typed(text)) is None or _is_variable_named_dtrain(text, shell.user_ns):
            return SimpleMatcherResult(completions=[])
        return _offered(typed, shell)

    return _marked(match, identifier="dnb.dtrain")


def _offered(typed: TypedLine, shell: Any) -> SimpleMatcherResult:
    """Answer alone, also if nothing fits: what is typed stands, for a keyword or another magic cannot be meant."""
    try:
        from dnb.notebook.completion.offers import offers_at  # torch: not before somebody completes a line
        from dnb.notebook.completion.values import Names

        found = offers_at(typed, Names.of(shell.user_ns, hidden=shell.user_ns_hidden))
    except KeyboardInterrupt:
        raise
    except USER_ERRORS as error:  # an object of the user's may raise anything when it is looked at
        log.debug("no completion: %s", summary_of(error))
        return _alone([SimpleCompletion(text=typed.token)], fragment=typed.token)
    offers = [SimpleCompletion(text=offer.text, type=offer.type) for offer in found.offers]
    return _alone(offers or [SimpleCompletion(text=found.fragment)], fragment=found.fragment)


def _attribute_matcher(shell: Any) -> Matcher:
    def match(context: CompletionContext) -> SimpleMatcherResult:
        found = attributes_at(_text_before(context), shell.user_ns)
        if found is None:
            return SimpleMatcherResult(completions=[])
        offers = [SimpleCompletion(text=name, type=kind) for name, kind in found.names.items()]
        return _alone(offers or [SimpleCompletion(text=found.fragment)], fragment=found.fragment)

    return _marked(match, identifier="dnb.names")


def _marked(match: Matcher, *, identifier: str) -> Matcher:
    """Mark a matcher for IPython: it is asked before all others, which need not be asked where it answers."""
    marked: Matcher = context_matcher(identifier=identifier, priority=100)(match)
    return marked


def _alone(completions: Iterable[SimpleCompletion], *, fragment: str) -> SimpleMatcherResult:
    return SimpleMatcherResult(completions=list(completions), matched_fragment=fragment, suppress=True, ordered=True)


def _text_before(context: CompletionContext) -> str:
    lines = context.full_text.split("\n")[: context.cursor_line]
    return "\n".join([*lines, context.text_until_cursor])


def _is_variable_named_dtrain(text: str, names: Any) -> bool:
    return "dtrain" in names and "%dtrain" not in text


def _identifier(matcher: Any) -> str:
    return str(getattr(matcher, "matcher_identifier", ""))
