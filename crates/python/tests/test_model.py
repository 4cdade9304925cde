"""The native API, blocking."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import ternion

WEEK = [{"role": "user", "content": "How many days are in a week?"}]


def wait_until(condition):
    """Waits for what happens soon, on a thread of the engine."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


def test_greedy_answers_are_those_of_transformers(packed, continuations):
    model = ternion.load(packed)
    for name, case in continuations.items():
        expected = case["greedy_f32"]
        answer = model.generate(case["input_ids"], max_tokens=len(expected), temperature=0, ignore_eos=True)
        assert answer.tokens == expected, name


def test_prompts_have_the_tokens_of_transformers(model, prompts):
    for case in prompts.values():
        if "messages" in case:
            assert model.tokenizer.encode_chat(case["messages"]) == case["input_ids"]
            assert model.tokenizer.render_chat(case["messages"]) == case["rendered"]
        else:
            assert model.tokenizer.encode(case["text"]) == case["input_ids"]


def test_an_answer_says_how_it_ended(model):
    answer = model.generate(WEEK)
    assert str(answer) == answer.text == "There are seven days in a week."
    assert answer.finish_reason == "end_of_sequence" and answer.stopped_by is None
    assert answer.usage.completion_tokens == len(answer.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(answer.tokens)
    assert answer.timing.first_token > 0 and answer.seed is None
    assert answer.served_by["backend"] == "candle"
    stopped = model.generate(WEEK, stop=" days")
    assert (stopped.text, stopped.finish_reason, stopped.stopped_by) == ("There are seven", "stop_string", " days")
    assert model.generate(WEEK, max_tokens=2).finish_reason == "max_tokens"


def test_a_stream_is_the_answer(model):
    stream = model.stream(WEEK)
    assert stream.ending is None
    assert "".join(stream) == model.generate(WEEK).text
    assert stream.ending.finish_reason == "end_of_sequence"
    assert next(stream, None) is None, "an iterator that has ended stays ended"


def test_events_tell_everything(model):
    events = list(model.events(WEEK, logprobs=True, top_logprobs=3))
    kinds = [event["type"] for event in events]
    assert kinds[-1] == "done" and {"prefill", "token", "text"} <= set(kinds)
    tokens = [event for event in events if event["type"] == "token"]
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 3 for token in tokens)


def test_scores_are_the_log_probabilities_of_an_answer(model):
    answer = model.generate("The sky is", max_tokens=8, temperature=0, logprobs=True)
    prompt = model.tokenizer.encode("The sky is")
    scores = model.score([*prompt, *answer.tokens], start=len(prompt), top=2)
    assert [score["id"] for score in scores] == answer.tokens
    assert [score["logprob"] for score in scores] == pytest.approx(answer.logprobs, abs=1e-4)
    assert all(score["top"][0]["id"] == score["id"] for score in scores)


def test_seeds(model):
    def answer(seed):
        return model.generate("Once", max_tokens=20, temperature=1.5, seed=seed)

    assert answer(7).tokens == answer(7).tokens
    assert answer(7).seed == 7
    drawn = answer(None)
    assert answer(drawn.seed).tokens == drawn.tokens


def test_a_bias_forbids_a_token(model):
    first = model.generate(WEEK, max_tokens=1).tokens[0]
    other = model.generate(WEEK, max_tokens=1, logit_bias={first: float("-inf")}).tokens[0]
    assert other != first


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"temprature": 1.0}, TypeError, "temprature"),
        ({"temperature": -1.0}, ternion.InvalidRequestError, "temperature"),
        ({"top_k": "many"}, ValueError, "sampling.top_k"),
        ({"max_tokens": 0}, ternion.InvalidRequestError, "max_tokens"),
        ({"max_tokens": 2**70}, ValueError, "max_tokens"),
        ({"max_tokens": -3}, ValueError, "^max_tokens: the number is out of range"),
        ({"temperature": "hot"}, ValueError, "^sampling.temperature: must be real number, not str"),
        ({"stop": [""]}, ternion.InvalidRequestError, "stop"),
        ({"tools": [{"type": "x"}]}, ValueError, "tools"),
        ({"template_args": 7}, ValueError, "template_args"),
    ],
)
def test_wrong_parameters_are_named(model, params, error, message):
    with pytest.raises(error, match=message):
        model.generate(WEEK, **params)


@pytest.mark.parametrize("prompt", [7, [7.5], [None], [{"content": "x"}], [{"role": "user", "content": 7}], [-1], ""])
def test_wrong_prompts_are_errors(model, prompt):
    with pytest.raises((TypeError, ternion.InvalidRequestError)):
        model.generate(prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "a prompt is a text, a list of token ids or a list of messages, not NoneType"),
        ({"role": "user", "content": "x"}, "not dict"),
        (b"x", "not bytes"),
        ([{"rol": "user", "content": "x"}], r"message 0 of the prompt has no 'role'; it has \['content', 'rol'\]"),
        ([{"role": "user", "content": "x"}, {"content": "y"}], "message 1 of the prompt has no 'role'"),
        ([{"role": "user", "content": "x"}, "y"], "not a list of dict"),
        ([5, 7.5], "not a list of float"),
    ],
)
def test_wrong_prompts_say_what_one_is(model, prompt, message):
    with pytest.raises(TypeError, match=message):
        model.generate(prompt)


def test_kinds_of_errors(model, tiny, tmp_path):
    with pytest.raises(ternion.ContextOverflowError) as overflow:
        model.generate([5] * 2000)
    assert overflow.value.kind == "context_overflow" and not overflow.value.retryable
    assert isinstance(overflow.value, ValueError) and isinstance(overflow.value, ternion.Error)
    with pytest.raises(FileNotFoundError, match="no such file"):
        ternion.load(tmp_path / "missing")
    with pytest.raises(ternion.InvalidConfigError, match="thread"):
        ternion.load(tiny, threds=2)
    with pytest.raises(ternion.InvalidConfigError, match="this is none"):
        ternion.load(tiny, "other")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0 but no more")
    with pytest.raises(ternion.InvalidModelError) as damaged:
        ternion.load(tmp_path / "model.gguf")
    assert damaged.value.operation == "load"


def test_a_configuration_and_settings_over_it(tiny, tmp_path):
    config = tmp_path / "models.toml"
    config.write_text(
        f"default_model = 'a'\n[models.a]\npath = '{tiny}'\ncontext_length = 128\n[models.b]\nbackend = 'echo'\n"
    )
    assert ternion.load(config).info["limits"]["context_length"] == 128
    assert ternion.load(config, context_length=256, threads=1).info["limits"]["context_length"] == 256
    echo = ternion.load(config, "b")
    assert echo.info["backend"] == "echo"
    with pytest.raises(ternion.InvalidConfigError, match="configured: a, b"):
        ternion.load(config, "c")


def test_a_closed_model_says_so(tiny):
    with ternion.load(tiny) as model:
        stream = model.stream(WEEK)
    assert "".join(stream) == "There are seven days in a week.", "a stream that runs goes on"
    with pytest.raises(ternion.ClosedError, match="closed"):
        model.generate(WEEK)


def test_leaving_a_loop_ends_the_generation(model):
    for _ in model.stream("Once", ignore_eos=True, max_tokens=900):
        break
    wait_until(lambda: model.stats()["active"] == 0)

    stream = model.stream("Once", ignore_eos=True, max_tokens=900)
    next(stream)
    assert model.stats()["active"] == 1
    del stream
    gc.collect()
    wait_until(lambda: model.stats()["active"] == 0)

    with model.stream("Once", ignore_eos=True, max_tokens=900) as stream:
        next(stream)
    wait_until(lambda: model.stats()["active"] == 0)
    assert list(stream) == []


def test_other_threads_run_while_the_engine_computes(model):
    counted, ended = 0, threading.Event()

    def count():
        nonlocal counted
        while not ended.is_set():
            counted += 1
            time.sleep(0)

    thread = threading.Thread(target=count)
    thread.start()
    before = counted
    answer = model.generate("Once", ignore_eos=True, max_tokens=200)
    during = counted - before
    ended.set()
    thread.join()
    assert answer.usage.completion_tokens == 200 and during > 200


def test_threads_share_a_model(model):
    expected = model.generate(WEEK).text
    answers = [None] * 8

    def ask(at):
        answers[at] = "".join(model.stream(WEEK))

    threads = [threading.Thread(target=ask, args=[at]) for at in range(len(answers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 8


def test_one_stream_has_one_reader_at_a_time(tmp_path):
    config = tmp_path / "slow.toml"
    config.write_text("[models.slow]\nbackend = 'echo'\n[models.slow.options]\ndelay_ms = 300\n")
    stream = ternion.load(config).stream("one two three")
    thread = threading.Thread(target=lambda: next(stream))
    thread.start()
    seen = []
    while thread.is_alive() and not seen:
        try:
            next(stream)
        except ValueError as error:
            seen.append(str(error))
    thread.join()
    assert seen == ["the stream is being read by another thread"]


# A shell that starts the tests in the background ignores SIGINT, which is inherited.
INTERRUPTED = """
import signal, sys, threading, os, ternion
signal.signal(signal.SIGINT, signal.default_int_handler)
model = ternion.load(sys.argv[1])
{setup}
threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    {call}
except KeyboardInterrupt:
    print("interrupted", model.generate("Once", max_tokens=2).usage.completion_tokens)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize(
    "call",
    [
        "while True: model.generate('Once', ignore_eos=True, max_tokens=900)",
        "while True: list(model.stream('Once', ignore_eos=True, max_tokens=900))",
    ],
)
def test_ctrl_c_ends_a_call(tiny, call):
    program = INTERRUPTED.format(setup="", call=call)
    output = subprocess.run([sys.executable, "-c", program, tiny], capture_output=True, text=True, timeout=60)
    assert output.stdout == "interrupted 2\n", output.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_ctrl_c_while_nothing_comes(tmp_path):
    config = tmp_path / "slow.toml"
    config.write_text("[models.slow]\nbackend = 'echo'\n[models.slow.options]\ndelay_ms = 60000\n")
    program = (
        "import signal, sys, threading, os, ternion\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "model = ternion.load(sys.argv[1])\n"
        "threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()\n"
        "model.generate('one two three')\n"
    )
    output = subprocess.run([sys.executable, "-c", program, str(config)], capture_output=True, text=True, timeout=30)
    assert output.returncode == -signal.SIGINT and "KeyboardInterrupt" in output.stderr, output.stderr


FORKED = """
import os, sys, ternion
model = ternion.load(sys.argv[1])
stream = model.stream("Once", max_tokens=5)
child = os.fork()
if child == 0:
    for call in (lambda: model.generate("Once", max_tokens=2), lambda: next(stream), lambda: model.stats()):
        try:
            call()
            os._exit(1)
        except ternion.ClosedError as error:
            print(error, flush=True)
    again = ternion.load(sys.argv[1])
    print(again.generate("Once", max_tokens=2).usage.completion_tokens, flush=True)
    del stream, model, again
    sys.exit(0)
_, status = os.waitpid(child, 0)
print("child", os.WEXITSTATUS(status), "parent", len(list(stream)) > 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_gets_a_clear_error_and_loads_anew(tiny):
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, tiny], capture_output=True, text=True, timeout=60
    )
    lines = output.stdout.splitlines()
    assert len(lines) == 5, output
    assert all("loaded before this process was forked; load it after the fork" in line for line in lines[:3])
    assert lines[3:] == ["2", "child 0 parent True"]


def test_python_exits_while_an_answer_runs(tiny):
    program = (
        "import sys, threading, ternion\n"
        "model = ternion.load(sys.argv[1])\n"
        "stream = model.stream('Once', ignore_eos=True, max_tokens=900)\n"
        "next(stream)\n"
        "threading.Thread(target=lambda: list(stream), daemon=True).start()\n"
    )
    output = subprocess.run([sys.executable, "-c", program, tiny], capture_output=True, text=True, timeout=60)
    assert (output.returncode, output.stderr) == (0, "")


def test_a_tokenizer_without_a_model(tiny, model):
    tokenizer = ternion.Tokenizer.open(tiny)
    text = "naïve 🦀 <|eot_id|>"
    ids = tokenizer.encode(text, add_special=False)
    assert ids == model.tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    plain = tokenizer.encode(text, trusted=False)
    assert plain[0] == tokenizer.bos_id and len(plain) > len(ids)
    assert tokenizer.token_bytes(10**6) is None
    assert max(tokenizer.bos_id, tokenizer.eos_id) < tokenizer.vocab_size


def test_the_version_is_that_of_the_crate():
    assert ternion.__version__.count(".") == 2


def test_constraints(model):
    assert model.generate(WEEK, constraint={"choice": ["seven", "eight"]}).text in ("seven", "eight")
    assert model.generate(WEEK, constraint={"regex": "[0-9]{3}"}, max_tokens=20).text.isdigit()
    with pytest.raises(ternion.InvalidRequestError, match="constraint"):
        model.generate(WEEK, constraint={"regexp": "x"})


def test_converting(model, gguf, tiny, tmp_path):
    assert ternion.load(gguf).generate(WEEK).text == model.generate(WEEK).text
    with pytest.raises(ternion.InvalidRequestError, match="unknown format `gguf-i2`"):
        ternion.convert(tiny, tmp_path / "x.gguf", "gguf-i2")
    with pytest.raises(ternion.Error, match="exists"):
        ternion.convert(tiny, gguf, "gguf-i2s")
    ternion.convert(tiny, gguf, "gguf-i2s", overwrite=True)
