package interop;

import com.alipay.remoting.BizContext;
import com.alipay.remoting.InvokeCallback;
import com.alipay.remoting.InvokeContext;
import com.alipay.remoting.rpc.RpcClient;
import com.alipay.remoting.rpc.protocol.SyncUserProcessor;
import com.alipay.sofa.rpc.core.request.SofaRequest;
import com.alipay.sofa.rpc.core.response.SofaResponse;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Queue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.Executor;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/**
 * SOFABolt's RpcClient under a bounded load; every answer is compared with what this call asked for.
 *
 * Arguments (key=value): target=HOST:PORT, name, service, mode=sofa|plain, wire=1|2, crc=on|off, connections, workers, sizes=0,256,
 * styles=sync,future,callback,note, method=echo|slow, callback=on|off (mode plain: the server calls back before it answers),
 * calls=N or seconds=S, pause_ms, timeout_ms, expect=ok|error (error: each call must fail with the library's error, and
 * a call for `afterwards` on the same connection must succeed).
 */
public final class Client {
    private final Map<String, String> options;
    private final String name;
    private final String url;
    private final int timeoutMs;
    private final RpcClient client = new RpcClient();
    private final AtomicLong number = new AtomicLong();
    private final AtomicLong calls = new AtomicLong();
    private final AtomicLong notes = new AtomicLong();
    private final AtomicLong served = new AtomicLong();
    private final AtomicLong calledBack = new AtomicLong();
    private final AtomicLong calledOther = new AtomicLong();
    private final AtomicLong expected = new AtomicLong();
    private final AtomicLong wrong = new AtomicLong();
    private final Queue<String> errors = new ConcurrentLinkedQueue<>();

    private Client(Map<String, String> options) {
        this.options = options;
        this.name = options.get("name");
        this.timeoutMs = Integer.parseInt(options.getOrDefault("timeout_ms", "5000"));
        String wire = options.getOrDefault("wire", "1");
        this.url = options.get("target") + "?_CONNECTTIMEOUT=3000&_PROTOCOL=" + wire + "&_VERSION=" + wire + "&_CONNECTIONNUM="
                + options.getOrDefault("connections", "1");
    }

    public static void main(String[] arguments) throws Exception {
        SofaSerializer.register();
        Client one = new Client(Wire.arguments(arguments));
        boolean good = one.run();
        System.exit(good ? 0 : 1);
    }

    private boolean run() throws Exception {
        client.registerUserProcessor(new SyncUserProcessor<Plain.Call>() {
            @Override
            public Object handleRequest(BizContext context, Plain.Call call) {
                served.incrementAndGet();
                Plain.CallAnswer answer = new Plain.CallAnswer();
                answer.client = name;
                answer.data = call.data;
                return answer;
            }

            @Override
            public String interest() {
                return Plain.Call.class.getName();
            }
        });
        client.startup();
        System.out.println("READY 0");
        if ("error".equals(options.get("expect"))) {
            refused();
        } else {
            load();
        }
        boolean good = errors.isEmpty() && wrong.get() == 0;
        StringBuilder list = new StringBuilder();
        errors.stream().limit(5).forEach(e -> list.append(list.length() == 0 ? "" : ",").append(Wire.quote(e)));
        System.out.println("{\"peer\":\"java-client\",\"name\":" + Wire.quote(name) + ",\"calls\":" + calls + ",\"notes\":" + notes
                + ",\"wrong\":" + wrong + ",\"errors\":" + errors.size() + ",\"first_errors\":[" + list + "],\"served\":" + served
                + ",\"called_back\":" + calledBack + ",\"called_other\":" + calledOther + ",\"expected\":" + expected + "}");
        System.out.flush();
        client.shutdown();
        return good;
    }

    private void load() throws InterruptedException {
        long calls = Long.parseLong(options.getOrDefault("calls", "0"));
        long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(
                (long) (1000 * Double.parseDouble(options.getOrDefault("seconds", "0"))));
        int pauseMs = Integer.parseInt(options.getOrDefault("pause_ms", "0"));
        int[] sizes = Arrays.stream(options.getOrDefault("sizes", "256").split(",")).mapToInt(Integer::parseInt).toArray();
        String[] styles = options.getOrDefault("styles", "sync").split(",");
        Thread[] workers = new Thread[Integer.parseInt(options.getOrDefault("workers", "1"))];
        for (int at = 0; at < workers.length; at++) {
            workers[at] = new Thread(() -> {
                while (errors.size() < 20) {
                    long mine = number.incrementAndGet();
                    if (calls > 0 ? mine > calls : System.nanoTime() >= end) {
                        return;
                    }
                    // Every size meets every style, since their numbers step apart.
                    int size = sizes[(int) (mine % sizes.length)];
                    String style = styles[(int) (mine / sizes.length % styles.length)];
                    try {
                        call(style, mine, size, options.get("service"), "echo");
                        if (pauseMs > 0) {
                            Thread.sleep(pauseMs); // Paces the load; nothing waits on it.
                        }
                    } catch (Exception e) {
                        errors.add(style + " " + mine + " of " + size + " bytes: " + e);
                    }
                }
            });
            workers[at].start();
        }
        for (Thread worker : workers) {
            worker.join();
        }
    }

    private void refused() throws Exception {
        for (int at = 0; at < Integer.parseInt(options.getOrDefault("calls", "1")); at++) {
            for (String style : new String[] {"sync", "future", "callback"}) {
                try {
                    call(style, number.incrementAndGet(), 64, options.get("service"), options.getOrDefault("method", "echo"));
                    errors.add(style + ": answered although nobody can: " + options.get("service"));
                } catch (Exception e) {
                    expected.incrementAndGet();
                    System.out.println("ERROR " + Wire.quote(style + " " + e));
                }
            }
            call("sync", number.incrementAndGet(), 64, options.get("afterwards"), "echo");
        }
    }

    private void call(String style, long mine, int size, String service, String method) throws Exception {
        byte[] data = Wire.payload(name, mine, size);
        boolean note = "note".equals(style);
        InvokeContext context = new InvokeContext();
        if ("off".equals(options.get("crc"))) {
            context.put(InvokeContext.BOLT_CRC_SWITCH, false);
        }
        Object request = request(service, note ? "note" : method, data);
        Object answer;
        switch (style) {
            case "note":
                client.oneway(url, request, context);
                notes.incrementAndGet();
                return;
            case "sync":
                answer = client.invokeSync(url, request, context, timeoutMs);
                break;
            case "future":
                answer = client.invokeWithFuture(url, request, context, timeoutMs).get();
                break;
            case "callback":
                CompletableFuture<Object> done = new CompletableFuture<>();
                client.invokeWithCallback(url, request, context, new InvokeCallback() {
                    @Override
                    public void onResponse(Object result) {
                        done.complete(result);
                    }

                    @Override
                    public void onException(Throwable e) {
                        done.completeExceptionally(e);
                    }

                    @Override
                    public Executor getExecutor() {
                        return null;
                    }
                }, timeoutMs);
                answer = done.get(timeoutMs + 2000L, TimeUnit.MILLISECONDS);
                break;
            default:
                throw new IllegalArgumentException("style " + style);
        }
        calls.incrementAndGet();
        check(mine, data, answer);
    }

    private Object request(String service, String method, byte[] data) {
        if ("plain".equals(options.get("mode"))) {
            Plain.Ask ask = new Plain.Ask();
            ask.caller = name;
            ask.note = "note".equals(method);
            ask.callBack = "on".equals(options.get("callback"));
            ask.data = data;
            return ask;
        }
        Map<String, String> headers = new LinkedHashMap<>();
        headers.put("sofa_head_target_service", service);
        headers.put("sofa_head_method_name", method);
        headers.put("sofa_head_target_app", "interop");
        headers.put("service", service);
        return new SofaRequest(headers, Wire.blob(data));
    }

    private void check(long mine, byte[] data, Object answer) {
        byte[] got;
        if (answer instanceof Plain.Answer) {
            got = ((Plain.Answer) answer).data;
            String other = ((Plain.Answer) answer).calledBack;
            if (other != null) {
                (name.equals(other) ? calledBack : calledOther).incrementAndGet();
            }
        } else {
            got = Wire.unblob(((SofaResponse) answer).content);
        }
        if (!Arrays.equals(data, got)) {
            wrong.incrementAndGet();
            errors.add("call " + mine + ": " + got.length + " bytes that are not mine: "
                    + new String(got, 0, Math.min(got.length, 60)));
        }
    }
}
