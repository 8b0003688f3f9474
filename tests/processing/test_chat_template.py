import sys

import pytest
import tiny

from omni_video_hf import OmniVideoProcessor
from omni_video_hf.processing.chat_template import bounded_rendering, check_chat_template
from omni_video_hf.utils.read_budget import read_budget

CHAT = [{"role": "user", "content": "hello"}]
LOOPS = {
    "ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "texts": "{% set t = 'x'.center(9999) %}{% for a in t %}{% for b in t %}{% for c in t %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "macros": "{% macro m(n) %}{% for a in range(9) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endfor %}{% endmacro %}"
    "{{ m(30) }}",
}
DOUBLING = {
    "texts": "{% set ns = namespace(x='a') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "lists": "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a local": "{% set x = 'a' %}" + "{% set x = x ~ x %}\n" * 60,
}


def processor(template):
    plain = tiny.processor()
    return OmniVideoProcessor(plain.image_processor, plain.tokenizer, chat_template=template, num_image_tokens=4)


@pytest.mark.parametrize("loop", LOOPS)
def test_loops_in_loops_end(loop):
    hostile = processor(LOOPS[loop])
    with (
        pytest.raises(ValueError, match=r"chat template runs more than 20,000 lines.*MAX_STEPS"),
        read_budget(max_steps=20_000),
    ):
        hostile.apply_chat_template(CHAT)
    assert sys.gettrace() is None or "coverage" in str(sys.gettrace())


@pytest.mark.parametrize("kind", DOUBLING)
def test_texts_that_double_end(kind):
    hostile = processor(DOUBLING[kind])
    with (
        pytest.raises(ValueError, match=r"chat template (creates a text|calls .* that may make a text).*MAX_BYTES"),
        read_budget(max_bytes=64 * 2**16),
    ):
        hostile.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 'a' * 99999999999 }}",
        "{{ 'a' * 99999 * 99999 }}",
        "{{ 'a'.center(99999999999) }}",
    ],
)
def test_giant_constants_are_refused_before_they_are_computed(template):
    with pytest.raises(ValueError, match="`chat_template`, line 1"):
        processor(template)
    with pytest.raises(ValueError, match="`chat_template`, line 1"):
        check_chat_template({"default": "{{ 1 }}", "other": template})


def test_no_template():
    with pytest.raises(ValueError, match="not a valid Jinja template"):
        processor("{% for %}")


def test_the_time_is_looked_at():
    with pytest.raises(ValueError, match="takes longer than"), read_budget(max_seconds=1e-9):
        processor("{% for a in range(9) %}{{ a }}{% endfor %}").apply_chat_template(CHAT)


def test_usual_templates_are_read():
    template = (
        "{% for m in messages %}{{ '  ' * loop.index }}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    )
    assert processor(template).apply_chat_template(CHAT) == "  hello"
    long = CHAT * 2000
    assert tiny.processor().apply_chat_template(long).count("hello") == 2000


def test_an_earlier_trace_function_comes_back():
    def trace(*_):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with bounded_rendering():
            pass
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


GROWING = {
    "replace": "{% set t = 'aaaaaaaaaa'.center(999) %}{% for i in range(9) %}{% set u = t|replace(' ', t) %}"
    "{% set v = u|replace(' ', u) %}{{ v|length }}{% endfor %}",
    "replace of a text": "{% set t = ' '.center(999) %}{% set u = t.replace(' ', t) %}{{ u.replace(' ', u)|length }}",
    "a computed number": "{% set n = 900000 %}{% set m = n + n %}{{ ('a'|center(m + m + m + m))|length }}",
    "a method": "{% set n = 900000 %}{{ 'a'.zfill(n + n + n + n + n + n)|length }}",
    "join": "{% set t = ' '.center(9999) %}{{ (t|list)|join(t)|length }}",
    "indent": "{% set n = 900000 %}{{ ('a\\n' * 50)|indent(n + n)|length }}",
    "lipsum": "{{ lipsum(n=900000, html=false) }}",
    "batch": "{% set n = 900000 %}{{ ([1]|batch(n + n + n + n + n, 0)|list)|length }}",
}


@pytest.mark.parametrize("kind", GROWING)
def test_one_call_that_makes_a_giant_text_is_refused_before_it_begins(kind):
    with (
        pytest.raises(ValueError, match=r"chat template calls `\w+` with values that may make.*MAX_BYTES"),
        read_budget(max_bytes=64 * 2**20),
    ):
        processor(GROWING[kind]).apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "template", ["{% set n = 9 %}{{ n * n }}", "{% set n = 9 %}{{ 'a' * n }}", "{% set t = 'a' %}{{ t * 99999 }}"]
)
def test_products_that_are_not_known_are_refused(template):
    with pytest.raises(ValueError, match=r"`chat_template`, line 1: multiplies values"):
        processor(template)


def test_usual_filters_and_methods_run():
    template = (
        "{% for m in messages %}{{ m.content|trim|replace('l', 'LL') ~ m.content.split('e')[0].strip() }}"
        "{{ m|tojson(indent=2)|length }}{{ '%s' % m.role }}{{ range(3)|join(', ') }}{{ 3 * 4 }}{% endfor %}"
    )
    text = processor(template).apply_chat_template(CHAT)
    assert text.startswith("heLLLLoh")
    assert text.endswith("user0, 1, 212")
    long = [{"role": "user", "content": "a<image> b " * 20_000}]
    assert len(processor("{{ messages[0].content|replace('<image>', '!') }}").apply_chat_template(long)) > 80_000
