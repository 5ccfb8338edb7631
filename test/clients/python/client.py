"""A SPIFFE workload in Python. ../clients_test.go says what it prints."""

import base64
import signal
import sys

from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import SpiffeId, WorkloadApiClient


def say(*words):
    print(*(" ".join(str(word).split()) for word in words), flush=True)


def der(certificate):
    return base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()


def show(context):
    for svid in context.x509_svids:
        say("x509", svid.spiffe_id, *map(der, svid.cert_chain))
    bundles(context.x509_bundle_set)
    say("updated")


def bundles(found):
    for bundle in found.bundles:
        say("x509-bundle", bundle.trust_domain, *map(der, bundle.x509_authorities))


def fetch(client, audience):
    def attempt(step, call):
        try:
            return call()
        except Exception as err:  # all that a caller would see
            say("error", step, err)

    attempt("x509", lambda: show(client.fetch_x509_context()))
    attempt("x509-bundles", lambda: bundles(client.fetch_x509_bundles()))
    svid = attempt("jwt", lambda: client.fetch_jwt_svid(audience={audience, "second"}))
    if svid:
        say("jwt", svid.spiffe_id, svid.token)
        say("valid", client.validate_jwt_svid(svid.token, audience).spiffe_id)
        attempt("audience", lambda: client.validate_jwt_svid(svid.token, "other"))
        forged = svid.token[:-8] + "AAAAAAAA"
        attempt("forged", lambda: client.validate_jwt_svid(forged, audience))
    stranger = SpiffeId("spiffe://clients.example/stranger")
    attempt("stranger", lambda: client.fetch_jwt_svid(audience={audience}, subject=stranger))
    keys = attempt("jwt-bundles", client.fetch_jwt_bundles)
    for bundle in keys.bundles if keys else []:
        say("jwt-bundle", bundle.trust_domain, *bundle.jwt_authorities)
    say("done")


def watch(client):
    client.stream_x509_contexts(show, lambda err: say("error", "watch", err))
    say("watching")
    signal.pause()


with WorkloadApiClient() as client:  # reads SPIFFE_ENDPOINT_SOCKET
    if sys.argv[1] == "watch":
        watch(client)
    else:
        fetch(client, "tool")
