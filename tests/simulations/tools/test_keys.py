"""Keys and certificates: what Flower and TLS accept, and nothing overwritten."""

import ssl
import stat
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from simulations.tools.keys import main, write_keys


def test_the_pairs_fit_and_private_ones_are_their_owners(tmp_path):
    write_keys(tmp_path / "k", ["127.0.0.1", "flower.example.org"], ["a", "b"])
    for name in "ab":
        private = load_ssh_private_key((tmp_path / "k" / name).read_bytes(), None)
        public = load_ssh_public_key((tmp_path / "k" / f"{name}.pub").read_bytes())
        assert private.public_key() == public
        assert isinstance(public.curve, ec.SECP384R1)
    for name in ("a", "b", "server.key"):
        assert stat.S_IMODE((tmp_path / "k" / name).stat().st_mode) == 0o600


def test_the_certificate_is_the_authoritys_and_names_its_hosts(tmp_path):
    write_keys(tmp_path, ["127.0.0.1", "flower.example.org"], [])
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    assert context.cert_store_stats()["x509_ca"] == 1
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    root, own = (
        x509.load_pem_x509_certificate((tmp_path / n).read_bytes())
        for n in ("ca.crt", "server.pem")
    )
    own.verify_directly_issued_by(root)
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(n.value) for n in names] == ["127.0.0.1", "flower.example.org"]
    with pytest.raises(ValueError, match="subject does not match certificate issuer"):
        root.verify_directly_issued_by(own)


def test_nothing_is_overwritten(tmp_path):
    write_keys(tmp_path, [], ["a"])
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="exists, and keys are not overwritten"):
        write_keys(tmp_path, ["h"], ["a"])
    assert (tmp_path / "a").read_bytes() == before
    assert not (tmp_path / "ca.crt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the SuperLink by --host, or a silo by --silo"),
        (["--silo", "a/b"], "--silo 'a/b' must be up to 64"),
        (["--host", "h:80"], "--host 'h:80' is neither a host name nor an address"),
        (["--host", "h", "--silo", "ca.crt"], "is the name of a file of the server"),
        (["--host", "h", "--days", "0"], "--days 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, words, message):
    assert main([str(tmp_path / "k"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "k").exists()


def test_the_command_lists_what_it_wrote(tmp_path, capsys):
    assert main([str(tmp_path), "--silo", "a"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a"), str(tmp_path / "a.pub")]


def test_openssh_reads_a_key(tmp_path):
    write_keys(tmp_path, [], ["a"])
    try:
        done = subprocess.run(
            ["ssh-keygen", "-y", "-f", tmp_path / "a"], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("ssh-keygen is not installed")
    assert done.stdout.split()[:2] == (tmp_path / "a.pub").read_text().split()[:2]
