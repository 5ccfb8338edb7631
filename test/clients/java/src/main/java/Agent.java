import io.spiffe.workloadapi.DefaultX509Source;

public final class Agent {
    public static void main(String[] args) throws Exception {
        try (var source = DefaultX509Source.newSource()) { // reads SPIFFE_ENDPOINT_SOCKET, waits for an identity
            System.out.println(source.getX509Svid().getSpiffeId()); // the newest, at each call
        }
    }
}
