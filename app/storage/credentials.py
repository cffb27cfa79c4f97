"""C2PA content credentials: a signed statement in a picture's file that this server made it with a model.

Changing the file afterwards breaks the signature. The statement holds no prompt and no thumbnail, and nothing
here uses the network. The package that writes it comes with the extra `c2pa`.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from app.errors import SettingsError, SigningFailed
from app.schemas import OutputFormat
from app.storage.encoding import AI_MADE, MIME_TYPES, encode

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.x509 import Certificate

CERTIFICATE, KEY = "CASCADE_C2PA_CERTIFICATE", "CASCADE_C2PA_KEY"
SOFTWARE = "Stable Cascade Server"

# IPTC's term for a picture that a model changed, as in inpainting and outpainting.
AI_EDITED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Signs pictures. For any number of threads at once."""

    context: Any = None  # c2pa.Context with a signer; None leaves pictures as they are
    expires_at: float = 0.0  # when the certificate does, in seconds since 1970; 0 without one

    def sign(self, content: bytes, output_format: OutputFormat, *, is_edit: bool) -> bytes:
        """Return the file `content` with credentials in it. Pixels and other metadata stay unchanged.

        `is_edit` says that a picture of the caller was redrawn. Raises SigningFailed, for example when the
        certificate has expired meanwhile.
        """
        if self.context is None:
            return content
        from c2pa import Builder, C2paError

        signed = BytesIO()
        try:
            with Builder(_manifest(AI_EDITED if is_edit else AI_MADE), self.context) as builder:
                builder.sign(MIME_TYPES[output_format], BytesIO(content), signed)
        except C2paError as error:
            raise SigningFailed("the picture could not be signed; the server's log says why") from error
        return signed.getvalue()


UNSIGNED = Credentials()


def make_credentials(certificate: Path | None, key: Path | None) -> Credentials:
    """Return what signs with a certificate chain, the signer's first, and its private key, both PEM files.

    Without files it signs nothing. Raises SettingsError if they cannot be used, or the extra is missing.
    """
    if certificate is None or key is None:
        return UNSIGNED
    try:
        from c2pa import C2paError, C2paSignerInfo, Context, Signer
        from cryptography.hazmat.primitives import serialization
    except (ImportError, RuntimeError) as error:  # the latter where c2pa has no native library
        raise SettingsError(
            f"{CERTIFICATE} needs the extra: pip install 'stable-cascade-server[c2pa]' ({_one_line(error)})"
        ) from None
    chain = _load_chain(certificate)
    private = _load_key(key)
    if private.public_key() != chain[0].public_key():
        raise SettingsError(f"{KEY}: {key} is not the key of the first certificate in {certificate}")
    _require_valid_now(chain[0], certificate)
    info = C2paSignerInfo(
        _algorithm(private, key),
        b"".join(link.public_bytes(serialization.Encoding.PEM) for link in chain),
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        None,  # no time-stamp authority, which would be called for each picture
    )
    try:
        context = Context.from_dict(_library_settings(chain[0]), Signer.from_info(info))
        credentials = Credentials(context, chain[0].not_valid_after_utc.timestamp())
        credentials.sign(encode(Image.new("RGB", (1, 1)), "png", 100), "png", is_edit=False)
    except (C2paError, SigningFailed) as error:
        reason = _one_line(error.__cause__ or error)
        raise SettingsError(f"{CERTIFICATE}: {certificate} cannot sign pictures: {reason}") from None
    return credentials


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _manifest(source: str) -> str:
    """Return what is stated of a picture of that IPTC source type."""
    actions = [{"action": "c2pa.created", "digitalSourceType": source}]
    # Without `created` it would count as gathered from others, and not as said by the signer.
    assertion = {"label": "c2pa.actions.v2", "created": True, "data": {"actions": actions}}
    return json.dumps({"assertions": [assertion]})


def _library_settings(certificate: "Certificate") -> dict[str, Any]:
    """Return settings of c2pa with which it calls nobody, and checks each signature that it made.

    Whom to trust is for those who read the picture to decide, and so is what the certificate must be for.
    """
    return {
        "version": 1,
        "core": {"allowed_network_hosts": []},
        "verify": {
            "verify_after_sign": True,
            "verify_trust": False,
            "ocsp_fetch": False,
            "remote_manifest_fetch": False,
        },
        "trust": {"trust_config": "\n".join(_usages(certificate))},
        "builder": {
            "claim_generator_info": {"name": SOFTWARE, "version": version("stable-cascade-server")},
            "thumbnail": {"enabled": False},
        },
    }


def _usages(certificate: "Certificate") -> list[str]:
    """Return the object identifiers of the extended key usages of a certificate."""
    from cryptography import x509

    try:
        usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except x509.ExtensionNotFound:
        return []
    return [usage.dotted_string for usage in usages.value]


def _load_chain(path: Path) -> "list[Certificate]":
    from cryptography import x509

    content = _read(path, CERTIFICATE)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise SettingsError(f"{CERTIFICATE}: {path} holds no certificate in PEM format") from None


def _load_key(path: Path) -> "PrivateKeyTypes":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    content = _read(path, KEY)
    try:
        return serialization.load_pem_private_key(content, password=None)
    except TypeError:
        raise SettingsError(f"{KEY}: {path} needs a password; store the key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise SettingsError(f"{KEY}: {path} holds no private key in PEM format") from None


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read: {error.strerror}") from None


def _require_valid_now(certificate: "Certificate", path: Path) -> None:
    first, last, now = certificate.not_valid_before_utc, certificate.not_valid_after_utc, datetime.now(UTC)
    if now > last:
        raise SettingsError(f"{CERTIFICATE}: {path} expired at {last:%Y-%m-%d %H:%M} UTC")
    if now < first:
        raise SettingsError(f"{CERTIFICATE}: {path} is not valid before {first:%Y-%m-%d %H:%M} UTC")


def _algorithm(key: "PrivateKeyTypes", path: Path) -> str:
    """Return the name of the signature algorithm that C2PA has for a key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return "ps256"
    curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return curves[key.curve.name]
    raise SettingsError(
        f"{KEY}: {path} must be a key of P-256, P-384, P-521 or Ed25519, or of RSA with at least 2048 bits"
    )
