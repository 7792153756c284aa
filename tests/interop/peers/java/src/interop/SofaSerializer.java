package interop;

import com.alipay.remoting.CustomSerializer;
import com.alipay.remoting.CustomSerializerManager;
import com.alipay.remoting.InvokeContext;
import com.alipay.remoting.exception.DeserializationException;
import com.alipay.remoting.rpc.RequestCommand;
import com.alipay.remoting.rpc.ResponseCommand;
import com.alipay.remoting.rpc.protocol.RpcRequestCommand;
import com.alipay.remoting.rpc.protocol.RpcResponseCommand;
import com.alipay.remoting.serialization.HessianSerializer;
import com.alipay.remoting.serialization.SerializerManager;
import com.alipay.sofa.rpc.core.request.SofaRequest;
import com.alipay.sofa.rpc.core.response.SofaResponse;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.LinkedHashMap;
import java.util.Map;

/** Bolt's own extension point for a header section: the map that SOFA peers route on, and content as raw bytes. */
final class SofaSerializer implements CustomSerializer {
    /** The codec id of protobuf in SOFA; Bolt carries it and leaves the bytes to the custom serializer. */
    static final byte PROTOBUF = 11;

    static void register() {
        SofaSerializer one = new SofaSerializer();
        CustomSerializerManager.registerCustomSerializer(SofaRequest.class.getName(), one);
        CustomSerializerManager.registerCustomSerializer(SofaResponse.class.getName(), one);
        // An exception answer has no custom serializer and is written with the request's codec id.
        SerializerManager.addSerializer(PROTOBUF, new HessianSerializer());
    }

    @Override
    public <T extends RequestCommand> boolean serializeHeader(T request, InvokeContext context) {
        SofaRequest body = (SofaRequest) ((RpcRequestCommand) request).getRequestObject();
        request.setHeader(encode(body.headers));
        return true;
    }

    @Override
    public <T extends ResponseCommand> boolean serializeHeader(T response) {
        return false;
    }

    @Override
    public <T extends RequestCommand> boolean deserializeHeader(T request) throws DeserializationException {
        ((RpcRequestCommand) request).setRequestHeader(decode(request.getHeader()));
        return true;
    }

    @Override
    public <T extends ResponseCommand> boolean deserializeHeader(T response, InvokeContext context)
            throws DeserializationException {
        ((RpcResponseCommand) response).setResponseHeader(decode(response.getHeader()));
        return true;
    }

    @Override
    public <T extends RequestCommand> boolean serializeContent(T request, InvokeContext context) {
        request.setSerializer(PROTOBUF);
        request.setContent(((SofaRequest) ((RpcRequestCommand) request).getRequestObject()).content);
        return true;
    }

    @Override
    public <T extends ResponseCommand> boolean serializeContent(T response) {
        response.setContent(((SofaResponse) ((RpcResponseCommand) response).getResponseObject()).content);
        return true;
    }

    @Override
    public <T extends RequestCommand> boolean deserializeContent(T request) throws DeserializationException {
        RpcRequestCommand command = (RpcRequestCommand) request;
        byte[] content = command.getContent() == null ? new byte[0] : command.getContent();
        command.setRequestObject(new SofaRequest(decode(command.getHeader()), content));
        return true;
    }

    @Override
    public <T extends ResponseCommand> boolean deserializeContent(T response, InvokeContext context) {
        RpcResponseCommand command = (RpcResponseCommand) response;
        command.setResponseObject(new SofaResponse(command.getContent() == null ? new byte[0] : command.getContent()));
        return true;
    }

    private static byte[] encode(Map<String, String> map) {
        ByteBuffer out = ByteBuffer.allocate(
                map.entrySet().stream().mapToInt(e -> 8 + utf8(e.getKey()).length + utf8(e.getValue()).length).sum());
        for (Map.Entry<String, String> entry : map.entrySet()) {
            byte[] key = utf8(entry.getKey());
            byte[] value = utf8(entry.getValue());
            out.putInt(key.length).put(key).putInt(value.length).put(value);
        }
        return out.array();
    }

    private static Map<String, String> decode(byte[] header) throws DeserializationException {
        Map<String, String> map = new LinkedHashMap<>();
        if (header == null) {
            return map;
        }
        ByteBuffer in = ByteBuffer.wrap(header);
        while (in.hasRemaining()) {
            map.put(text(in), text(in));
        }
        return map;
    }

    private static String text(ByteBuffer in) throws DeserializationException {
        int length = in.getInt();
        if (length == -1) {
            return "";
        }
        if (length < 0 || length > in.remaining()) {
            throw new DeserializationException("a header string of " + length + " bytes");
        }
        byte[] bytes = new byte[length];
        in.get(bytes);
        return new String(bytes, StandardCharsets.UTF_8);
    }

    private static byte[] utf8(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }
}
