import io.spiffe.bundle.x509bundle.X509BundleSet;
import io.spiffe.spiffeid.SpiffeId;
import io.spiffe.workloadapi.DefaultWorkloadApiClient;
import io.spiffe.workloadapi.Watcher;
import io.spiffe.workloadapi.WorkloadApiClient;
import io.spiffe.workloadapi.X509Context;
import java.security.cert.CertificateEncodingException;
import java.security.cert.X509Certificate;
import java.util.Base64;
import java.util.Collection;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;
import java.util.stream.Stream;

/** A SPIFFE workload in Java. ../../../../clients_test.go says what it prints. */
public final class Client {
    public static void main(String[] args) throws Exception {
        try (WorkloadApiClient client = DefaultWorkloadApiClient.newClient()) { // reads SPIFFE_ENDPOINT_SOCKET
            if (args[0].equals("watch")) {
                watch(client);
            } else {
                fetch(client, "tool");
            }
        }
    }

    static void watch(WorkloadApiClient client) throws Exception {
        client.watchX509Context(new Watcher<>() {
            @Override
            public void onUpdate(X509Context context) {
                show(context);
            }

            @Override
            public void onError(Throwable err) {
                say("error", "watch", reason(err));
            }
        });
        say("watching");
        Thread.currentThread().join();
    }

    static void fetch(WorkloadApiClient client, String audience) {
        attempt("x509", () -> {
            show(client.fetchX509Context());
            return null;
        });
        attempt("x509-bundles", () -> {
            bundles(client.fetchX509Bundles());
            return null;
        });
        var svid = attempt("jwt", () -> client.fetchJwtSvid(audience, "second"));
        if (svid != null) {
            String token = svid.marshal();
            say("jwt", svid.getSpiffeId().toString(), token);
            var valid = attempt("valid", () -> client.validateJwtSvid(token, audience));
            say("valid", valid.getSpiffeId().toString());
            attempt("audience", () -> client.validateJwtSvid(token, "other"));
            String forged = token.substring(0, token.length() - 8) + "AAAAAAAA";
            attempt("forged", () -> client.validateJwtSvid(forged, audience));
        }
        var stranger = SpiffeId.parse("spiffe://clients.example/stranger");
        attempt("stranger", () -> client.fetchJwtSvid(stranger, audience));
        var keys = attempt("jwt-bundles", client::fetchJwtBundles);
        if (keys != null) {
            keys.getBundles().forEach((domain, bundle) ->
                    say("jwt-bundle", domain.toString(), String.join(" ", bundle.getJwtAuthorities().keySet())));
        }
        say("done");
    }

    static <T> T attempt(String step, Callable<T> call) {
        try {
            return call.call();
        } catch (Exception err) { // all that a caller would see
            say("error", step, reason(err));
            return null;
        }
    }

    static String reason(Throwable err) {
        return Stream.iterate(err, e -> e != null, Throwable::getCause).map(Throwable::toString).collect(Collectors.joining("; "));
    }

    static void show(X509Context context) {
        context.getX509Svids().forEach(svid -> say("x509", svid.getSpiffeId().toString(), der(svid.getChain())));
        bundles(context.getX509BundleSet());
        say("updated");
    }

    static void bundles(X509BundleSet found) {
        found.getBundles().forEach((domain, bundle) -> say("x509-bundle", domain.toString(), der(bundle.getX509Authorities())));
    }

    static String der(Collection<X509Certificate> certificates) {
        return certificates.stream().map(certificate -> {
            try {
                return Base64.getEncoder().encodeToString(certificate.getEncoded());
            } catch (CertificateEncodingException err) {
                throw new IllegalStateException(err);
            }
        }).collect(Collectors.joining(" "));
    }

    static void say(String... words) {
        System.out.println(String.join(" ", words).replaceAll("\\s+", " "));
    }
}
