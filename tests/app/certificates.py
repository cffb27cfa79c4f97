"""Certificates for content credentials, made by an authority of our own; and what a reader of C2PA says."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLAIM_SIGNING = x509.ObjectIdentifier("1.3.6.1.4.1.62558.2.1")  # what C2PA's own trust list asks for
DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Identity:
    """The PEM files of somebody who signs."""

    certificate: Path
    key: Path

    @property
    def settings(self) -> dict[str, Path]:
        return {"c2pa_certificate": self.certificate, "c2pa_key": self.key}


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def identity(
    folder: Path,
    key: Any = None,
    *,
    usage: x509.ObjectIdentifier | None = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    begins: timedelta = -DAY,
    ends: timedelta = DAY,
) -> Identity:
    """Write a chain of two certificates, that of the key first, and the key."""
    key, authority = key or new_key(), new_key()
    root = (
        _certificate("Authority", authority, begins, ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority, hashes.SHA256())
    )
    draft = (
        _certificate("Signer", key, begins, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_only_signatures(), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False
        )
    )
    if usage is not None:
        draft = draft.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    chain = (draft.sign(authority, hashes.SHA256()), root)
    pem = serialization.Encoding.PEM
    files = Identity(folder / "chain.pem", folder / "key.pem")
    files.certificate.write_bytes(b"".join(link.public_bytes(pem) for link in chain))
    files.key.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def _certificate(name: str, key: Any, begins: timedelta, ends: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name("Authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )


def _name(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _only_signatures() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def manifest(content: bytes, output_format: str, usage: str = "") -> dict[str, Any]:
    """The valid manifest of a picture, whose signer nobody here knows."""
    assert problems(content, output_format, usage) == ["signingCredential.untrusted"]
    with _reader(content, output_format, usage) as reader:
        assert reader.get_validation_state() == "Valid"
        found: dict[str, Any] = reader.get_active_manifest()
    return found


def problems(content: bytes, output_format: str, usage: str = "") -> list[str]:
    """The codes of what a reader finds wrong with a signed picture."""
    with _reader(content, output_format, usage) as reader:
        return [status["code"] for status in json.loads(reader.json())["validation_status"]]


def source_type(content: bytes, output_format: str) -> str:
    """The only thing that a signer says was done: a picture was created, from this type of source."""
    [assertion] = manifest(content, output_format)["assertions"]
    assert assertion["label"] == "c2pa.actions.v2"
    with _reader(content, output_format, "") as reader:
        [stored] = json.loads(reader.detailed_json())["manifests"].values()
    said = [entry["url"] for entry in stored["claim"]["created_assertions"]]
    assert "self#jumbf=c2pa.assertions/c2pa.actions.v2" in said
    [action] = assertion["data"]["actions"]
    assert action["action"] == "c2pa.created"
    found: str = action["digitalSourceType"]
    return found


def _reader(content: bytes, output_format: str, usage: str) -> Any:
    """Of a program that accepts certificates of that extended key usage, besides the usual one."""
    context = c2pa.Context.from_dict({"version": 1, "trust": {"trust_config": usage}} if usage else {})
    return c2pa.Reader(f"image/{output_format}", BytesIO(content), context=context)
