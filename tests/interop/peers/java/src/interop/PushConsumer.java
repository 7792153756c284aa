package interop;

import com.alipay.remoting.BizContext;
import com.alipay.remoting.Connection;
import com.alipay.remoting.ConnectionEventType;
import com.alipay.remoting.InvokeContext;
import com.alipay.remoting.rpc.RpcClient;
import com.alipay.remoting.rpc.protocol.SyncUserProcessor;
import fastmesh.push.v1;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.URI;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Queue;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;

/**
 * A client of the message mesh on SOFABolt alone: registers over HTTP, says hello, subscribes, consumes, is asked about its
 * transactions, and publishes. Lines of its standard input are what it is told to do; their end is its own.
 *
 * Arguments, commands and what it answers: as peers/node/push_consumer.js.
 */
public final class PushConsumer {
    private static final String RETRY_MS = "50";
    private final Map<String, String> options;
    private final String name;
    private final int timeoutMs;
    private final RpcClient client = new RpcClient();
    private Connection connection;
    private volatile boolean leaving;
    private final AtomicLong got = new AtomicLong();
    private final AtomicLong put = new AtomicLong();
    private final AtomicLong checked = new AtomicLong();
    private final AtomicLong oneways = new AtomicLong();
    private final AtomicInteger busy = new AtomicInteger();
    private final Set<String> seen = ConcurrentHashMap.newKeySet();
    private final Queue<String> errors = new ConcurrentLinkedQueue<>();

    private PushConsumer(Map<String, String> options) {
        this.options = options;
        this.name = options.get("name");
        this.timeoutMs = Integer.parseInt(options.getOrDefault("timeout_ms", "10000"));
    }

    public static void main(String[] arguments) throws Exception {
        v1.register();
        boolean good = new PushConsumer(Wire.arguments(arguments)).run();
        System.exit(good ? 0 : 1);
    }

    private boolean run() throws InterruptedException {
        try {
            List<String> groups = register();
            connect();
            must(new v1("fm.op", "hello", "fm.protocol", "1", "fm.app", options.get("app"), "fm.client", name));
            must(new v1("fm.op", "subscribe", "fm.group", options.getOrDefault("start", String.join(",", groups))));
            System.out.println("READY 0");
            obeyAll();
            must(new v1("fm.op", "suspend"));
            while (busy.get() > 0) {
                Thread.sleep(10); // Until the last handler has answered; it takes no longer than a print.
            }
            leaving = true;
            client.oneway(connection, new v1("fm.op", "goaway", "fm.reason", "done"), context());
        } catch (Exception e) {
            errors.add(String.valueOf(e));
        }
        StringBuilder list = new StringBuilder();
        errors.stream().limit(5).forEach(e -> list.append(list.length() == 0 ? "" : ",").append(Wire.quote(e)));
        leaving = true;
        client.shutdown();
        print("{\"peer\":\"push-java\",\"name\":" + Wire.quote(name) + ",\"got\":" + got + ",\"put\":" + put + ",\"checked\":" + checked
                + ",\"oneways\":" + oneways + ",\"errors\":" + errors.size() + ",\"first_errors\":[" + list + "]}");
        return errors.isEmpty();
    }

    private List<String> register() throws Exception {
        Set<String> names = new LinkedHashSet<>();
        StringBuilder groups = new StringBuilder();
        for (String text : options.get("groups").split(";")) {
            String[] part = text.split("/");
            names.add(part[0]);
            groups.append(groups.length() == 0 ? "" : ",").append("{\"name\":").append(Wire.quote(part[0])).append(",\"topic\":")
                    .append(Wire.quote(part[1])).append(",\"role\":").append(Wire.quote(part[2]));
            if (part.length > 3 && !part[3].isEmpty()) {
                groups.append(",\"prefetch\":").append(part[3]);
            }
            if (part.length > 4) {
                groups.append(",\"filter\":").append(Wire.quote(part[4]));
            }
            groups.append("}");
        }
        if (!"none".equals(options.get("registration"))) {
            StringBuilder topics = new StringBuilder();
            for (String topic : options.getOrDefault("topics", "").split(",")) {
                if (!topic.isEmpty()) {
                    topics.append(topics.length() == 0 ? "" : ",").append("{\"name\":").append(Wire.quote(topic)).append("}");
                }
            }
            String body = "{\"app\":" + Wire.quote(options.get("app")) + ",\"client\":" + Wire.quote(name) + ",\"topics\":[" + topics
                    + "],\"groups\":[" + groups + "]}";
            HttpResponse<String> answer = java.net.http.HttpClient.newBuilder().version(java.net.http.HttpClient.Version.HTTP_1_1).build()
                    .send(HttpRequest.newBuilder(URI.create("http://" + options.get("registration") + "/v1/registrations"))
                            .POST(HttpRequest.BodyPublishers.ofString(body)).build(), HttpResponse.BodyHandlers.ofString());
            if (answer.statusCode() != 200 && answer.statusCode() != 201) {
                throw new IllegalStateException("registration: " + answer.statusCode() + " " + answer.body());
            }
        }
        return new ArrayList<>(names);
    }

    private void connect() throws Exception {
        client.registerUserProcessor(new SyncUserProcessor<v1>() {
            @Override
            public Object handleRequest(BizContext context, v1 asked) {
                busy.incrementAndGet();
                try {
                    return answer(asked);
                } finally {
                    busy.decrementAndGet();
                }
            }

            @Override
            public String interest() {
                return v1.class.getName();
            }
        });
        client.addConnectionEventProcessor(ConnectionEventType.CLOSE, (address, lost) -> {
            if (!leaving) {
                errors.add("the connection was lost");
            }
        });
        client.startup();
        String wire = options.getOrDefault("wire", "1");
        // Calls by address would open another connection in silence when this one is lost, and nobody would have said hello there.
        connection = client.getConnection(options.get("mesh") + "?_CONNECTTIMEOUT=3000&_PROTOCOL=" + wire + "&_VERSION=" + wire, 3000);
        client.enableConnHeartbeat(connection.getUrl());
    }

    private v1 answer(v1 asked) {
        switch (asked.headers.getOrDefault("fm.op", "")) {
            case "deliver":
                return consume(asked);
            case "check":
                return check(asked);
            case "goaway":
                oneways.incrementAndGet();
                return new v1("fm.result", "consumed"); // Not sent when it was a oneway.
            default:
                return new v1("fm.result", "reject", "fm.reason", "not for a client: " + asked.headers.get("fm.op"));
        }
    }

    /** Written down before it is answered: what was answered and is not here, was never consumed. */
    private v1 consume(v1 asked) {
        if (asked.headers.containsKey("h.fail")) {
            throw new IllegalStateException("a handler that fails");
        }
        String id = asked.headers.get("fm.id");
        String group = asked.headers.get("fm.group");
        String attempt = asked.headers.get("fm.attempt");
        boolean first = seen.add(group + " " + id);
        boolean later = number(id) % 7 == 3 && first && "1".equals(attempt);
        got.incrementAndGet();
        print("GOT {\"group\":" + Wire.quote(group) + ",\"topic\":" + Wire.quote(asked.headers.get("fm.topic")) + ",\"id\":" + Wire.quote(id)
                + ",\"attempt\":" + attempt + ",\"key\":" + optional(asked, "fm.key") + ",\"colour\":" + optional(asked, "fm.colour")
                + ",\"note\":" + optional(asked, "h.note") + ",\"empty\":" + optional(asked, "h.empty") + ",\"said\":"
                + (later ? "\"later\"" : "\"consumed\"") + ",\"size\":" + asked.content.length + ",\"digest\":\"" + digest(asked.content) + "\"}");
        return later ? new v1("fm.result", "later", "fm.retry_ms", RETRY_MS) : new v1("fm.result", "consumed");
    }

    private v1 check(v1 asked) {
        String id = asked.headers.get("fm.id");
        long rest = number(id) % 3;
        boolean first = seen.add("check " + id);
        String said = rest == 0 ? "rollback" : rest == 2 && first ? "unknown" : "commit";
        checked.incrementAndGet();
        print("CHECKED {\"group\":" + optional(asked, "fm.group") + ",\"id\":" + Wire.quote(id) + ",\"said\":\"" + said + "\",\"size\":"
                + asked.content.length + ",\"digest\":\"" + digest(asked.content) + "\"}");
        return new v1("fm.result", said);
    }

    private void obeyAll() throws Exception {
        List<Thread> threads = new ArrayList<>();
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = in.readLine(); line != null; line = in.readLine()) {
            String told = line;
            Thread thread = new Thread(() -> {
                try {
                    obey(told.trim().split(" "));
                } catch (Exception e) {
                    errors.add(told + ": " + e);
                }
            });
            thread.start();
            threads.add(thread);
        }
        for (Thread thread : threads) {
            thread.join();
        }
    }

    private void obey(String[] words) throws Exception {
        if ("subscribe".equals(words[0])) {
            String groups = words.length > 1 ? words[1] : "";
            must(new v1("fm.op", "subscribe", "fm.group", groups));
            print("SUBSCRIBED " + Wire.quote(groups));
            return;
        }
        if (!"publish".equals(words[0]) && !"prepare".equals(words[0])) {
            throw new IllegalArgumentException("no such command");
        }
        Map<String, String> told = Wire.arguments(Arrays.copyOfRange(words, 1, words.length));
        long first = Long.parseLong(told.get("first"));
        long count = Long.parseLong(told.get("count"));
        AtomicLong next = new AtomicLong(first);
        List<Thread> window = new ArrayList<>();
        for (int i = 0; i < Integer.parseInt(told.getOrDefault("window", "8")); i++) {
            Thread thread = new Thread(() -> {
                for (long mine = next.getAndIncrement(); mine < first + count; mine = next.getAndIncrement()) {
                    try {
                        publish(words[0], mine, told);
                    } catch (Exception e) {
                        errors.add(words[0] + " " + mine + ": " + e);
                    }
                }
            });
            thread.start();
            window.add(thread);
        }
        for (Thread thread : window) {
            thread.join();
        }
        print("DONE {\"word\":\"" + words[0] + "\",\"topic\":" + Wire.quote(told.get("topic")) + ",\"count\":" + count + "}");
    }

    private void publish(String word, long mine, Map<String, String> told) throws Exception {
        String[] sizes = told.get("sizes").split(",");
        v1 message = new v1("fm.op", "publish", "fm.topic", told.get("topic"), "fm.id", name + "-" + mine, "h.note", "grüße ✓ " + mine,
                "h.empty", "");
        if (told.containsKey("colour")) {
            message.headers.put("fm.colour", told.get("colour"));
        }
        if (told.containsKey("key")) {
            message.headers.put("fm.key", "key-" + mine % 5);
        }
        if ("prepare".equals(word)) {
            message.headers.put("fm.tx", "prepare");
            message.headers.put("fm.group", told.get("group"));
        }
        message.content = Wire.payload(name, mine, Integer.parseInt(sizes[(int) (mine % sizes.length)]));
        for (int retries = 0;; retries++) {
            Map<String, String> answer = ask(message);
            String id = message.headers.get("fm.id");
            if ("consumed".equals(answer.get("fm.result"))) {
                if (!id.equals(answer.get("fm.id"))) {
                    throw new IllegalStateException("the answer of " + answer.get("fm.id") + " for " + id);
                }
                put.incrementAndGet();
                print("PUT {\"id\":" + Wire.quote(id) + ",\"topic\":" + Wire.quote(told.get("topic")) + ",\"broker\":"
                        + Wire.quote(answer.get("fm.broker")) + ",\"retries\":" + retries + "}");
                return;
            }
            if (!"later".equals(answer.get("fm.result")) || retries == 100) {
                throw new IllegalStateException(answer.toString());
            }
            Thread.sleep(Long.parseLong(answer.getOrDefault("fm.retry_ms", "100")));
        }
    }

    private Map<String, String> ask(v1 asked) throws Exception {
        return new LinkedHashMap<>(((v1) client.invokeSync(connection, asked, context(), timeoutMs)).headers);
    }

    private void must(v1 asked) throws Exception {
        Map<String, String> answer = ask(asked);
        if (!"consumed".equals(answer.get("fm.result"))) {
            throw new IllegalStateException(asked.headers.get("fm.op") + ": " + answer);
        }
    }

    private InvokeContext context() {
        InvokeContext context = new InvokeContext();
        context.put(InvokeContext.BOLT_CRC_SWITCH, "on".equals(options.get("crc")));
        return context;
    }

    private static long number(String id) {
        return Long.parseLong(id.substring(id.lastIndexOf('-') + 1));
    }

    private static String optional(v1 asked, String key) {
        String value = asked.headers.get(key);
        return value == null ? "null" : Wire.quote(value);
    }

    private static String digest(byte[] content) {
        try {
            StringBuilder text = new StringBuilder();
            for (byte b : MessageDigest.getInstance("SHA-256").digest(content)) {
                text.append(String.format("%02x", b));
            }
            return text.toString();
        } catch (java.security.NoSuchAlgorithmException e) {
            throw new IllegalStateException(e);
        }
    }

    /** One line, whole, and at once: nothing of it is in this process when it is killed. */
    private static synchronized void print(String line) {
        byte[] bytes = (line + "\n").getBytes(StandardCharsets.UTF_8);
        System.out.write(bytes, 0, bytes.length);
        System.out.flush();
    }
}
