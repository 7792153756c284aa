package interop;

import com.alipay.remoting.BizContext;
import com.alipay.remoting.rpc.RpcServer;
import com.alipay.remoting.rpc.protocol.SyncUserProcessor;
import com.alipay.sofa.rpc.core.request.SofaRequest;
import com.alipay.sofa.rpc.core.response.SofaResponse;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicLong;

/**
 * SOFABolt's RpcServer, answering with what it was asked. Serves until its standard input ends, then prints a summary.
 *
 * The method `slow` takes SLOW_MS, to miss a deadline.
 *
 * Arguments: port=N, services=NAME,... (requests for another one are refused with an exception).
 */
public final class Server {
    private static final long SLOW_MS = 1500;
    private static final AtomicLong answered = new AtomicLong();
    private static final AtomicLong notes = new AtomicLong();
    private static final AtomicLong calls = new AtomicLong();
    private static final AtomicLong wrong = new AtomicLong();
    private static final Set<String> distinct = ConcurrentHashMap.newKeySet();
    private static final Set<String> connections = ConcurrentHashMap.newKeySet();

    public static void main(String[] arguments) throws Exception {
        Map<String, String> options = Wire.arguments(arguments);
        List<String> services = Arrays.asList(options.getOrDefault("services", "").split(","));
        SofaSerializer.register();
        RpcServer server = new RpcServer("127.0.0.1", Integer.parseInt(options.get("port")), true);
        server.registerUserProcessor(new SyncUserProcessor<SofaRequest>() {
            @Override
            public Object handleRequest(BizContext context, SofaRequest request) throws InterruptedException {
                connections.add(context.getRemoteAddress());
                if (!services.contains(request.headers.get("service"))) {
                    wrong.incrementAndGet();
                    throw new IllegalStateException("not my service: " + request.headers.get("service"));
                }
                if ("note".equals(request.headers.get("sofa_head_method_name"))) {
                    note(Wire.unblob(request.content));
                    return new SofaResponse(new byte[0]);
                }
                if ("slow".equals(request.headers.get("sofa_head_method_name"))) {
                    Thread.sleep(SLOW_MS);
                }
                answered.incrementAndGet();
                return new SofaResponse(request.content);
            }

            @Override
            public String interest() {
                return SofaRequest.class.getName();
            }
        });
        server.registerUserProcessor(new SyncUserProcessor<Plain.Ask>() {
            @Override
            public Object handleRequest(BizContext context, Plain.Ask ask) throws Exception {
                connections.add(context.getRemoteAddress());
                Plain.Answer answer = new Plain.Answer();
                answer.data = ask.data;
                if (ask.note) {
                    note(ask.data);
                    return answer;
                }
                if (ask.callBack) {
                    Plain.Call call = new Plain.Call();
                    call.data = Wire.payload("server for " + ask.caller, calls.incrementAndGet(), 300);
                    Plain.CallAnswer said = (Plain.CallAnswer) server.invokeSync(context.getConnection(), call, 3000);
                    if (!Arrays.equals(said.data, call.data)) {
                        wrong.incrementAndGet();
                    }
                    answer.calledBack = said.client;
                }
                answered.incrementAndGet();
                return answer;
            }

            @Override
            public String interest() {
                return Plain.Ask.class.getName();
            }
        });
        server.startup();
        System.out.println("READY " + options.get("port"));
        while (System.in.read() != -1) {
            continue; // Only the end counts.
        }
        // Nobody answers a note, so the last ones may still be on their way here when we are told to end:
        // look until none has come for a while. One that is lost is missed all the same.
        long seen = -1;
        for (int look = 0; look < 12 && seen != notes.get(); look++) {
            seen = notes.get();
            Thread.sleep(250);
        }
        server.shutdown();
        System.out.println("{\"peer\":\"java-server\",\"answered\":" + answered + ",\"notes\":" + notes
                + ",\"notes_distinct\":" + distinct.size() + ",\"calls\":" + calls + ",\"wrong\":" + wrong
                + ",\"connections\":" + connections.size() + "}");
        System.out.flush();
        System.exit(wrong.get() == 0 ? 0 : 1);
    }

    private static void note(byte[] data) {
        notes.incrementAndGet();
        // The number and the caller stand first; the whole of minutes of notes would fill the heap.
        distinct.add(data.length + " " + new String(data, 0, Math.min(data.length, 40), StandardCharsets.UTF_8));
    }
}
