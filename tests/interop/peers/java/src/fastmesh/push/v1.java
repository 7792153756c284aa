package fastmesh.push;

import com.alipay.remoting.CustomSerializerManager;
import com.alipay.remoting.DefaultCustomSerializer;
import com.alipay.remoting.InvokeContext;
import com.alipay.remoting.exception.DeserializationException;
import com.alipay.remoting.rpc.RequestCommand;
import com.alipay.remoting.rpc.ResponseCommand;
import com.alipay.remoting.rpc.protocol.RpcRequestCommand;
import com.alipay.remoting.rpc.protocol.RpcResponseCommand;
import java.io.ByteArrayOutputStream;
import java.nio.BufferUnderflowException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * A frame of the message mesh, request or answer. SOFABolt writes the name of an object's class as the class of
 * the frame: that is why this class is called what it is.
 */
public final class v1 implements java.io.Serializable {
    private static final long serialVersionUID = 1;
    public final LinkedHashMap<String, String> headers = new LinkedHashMap<>();
    public byte[] content = new byte[0];

    public v1(String... pairs) {
        for (int i = 0; i < pairs.length; i += 2) {
            headers.put(pairs[i], pairs[i + 1]);
        }
    }

    /** Once per process, before the first frame. */
    public static void register() {
        CustomSerializerManager.registerCustomSerializer(v1.class.getName(), new Codec());
    }

    private static v1 of(byte[] section, byte[] content) throws DeserializationException {
        v1 made = new v1();
        ByteBuffer in = ByteBuffer.wrap(section == null ? new byte[0] : section);
        try {
            while (in.hasRemaining()) {
                String key = text(in);
                String value = text(in);
                if (key != null && value != null) {
                    made.headers.putIfAbsent(key, value);
                }
            }
        } catch (BufferUnderflowException e) {
            throw new DeserializationException("a header section that is cut off", e);
        }
        if (content != null) {
            made.content = content;
        }
        return made;
    }

    private static String text(ByteBuffer in) {
        int size = in.getInt();
        if (size < 0) {
            return null;
        }
        if (size > in.remaining()) {
            throw new BufferUnderflowException();
        }
        byte[] raw = new byte[size];
        in.get(raw);
        return new String(raw, StandardCharsets.UTF_8);
    }

    private byte[] section() {
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        for (Map.Entry<String, String> pair : headers.entrySet()) {
            put(out, pair.getKey());
            put(out, pair.getValue());
        }
        return out.toByteArray();
    }

    private static void put(ByteArrayOutputStream out, String text) {
        byte[] raw = text.getBytes(StandardCharsets.UTF_8);
        out.writeBytes(ByteBuffer.allocate(4).putInt(raw.length).array());
        out.writeBytes(raw);
    }

    /** The codec byte that the specification recommends; SOFABolt looks at it nowhere here. */
    private static final byte PROTOBUF = 11;

    private static final class Codec extends DefaultCustomSerializer {
        @Override
        public <T extends RequestCommand> boolean serializeHeader(T command, InvokeContext context) {
            command.setHeader(((v1) ((RpcRequestCommand) command).getRequestObject()).section());
            return true;
        }

        @Override
        public <T extends RequestCommand> boolean serializeContent(T command, InvokeContext context) {
            command.setSerializer(PROTOBUF);
            command.setContent(((v1) ((RpcRequestCommand) command).getRequestObject()).content);
            return true;
        }

        @Override
        public <T extends RequestCommand> boolean deserializeContent(T command) throws DeserializationException {
            ((RpcRequestCommand) command).setRequestObject(of(command.getHeader(), command.getContent()));
            return true;
        }

        @Override
        public <T extends ResponseCommand> boolean serializeHeader(T command) {
            command.setHeader(((v1) ((RpcResponseCommand) command).getResponseObject()).section());
            return true;
        }

        @Override
        public <T extends ResponseCommand> boolean serializeContent(T command) {
            command.setContent(((v1) ((RpcResponseCommand) command).getResponseObject()).content);
            return true;
        }

        @Override
        public <T extends ResponseCommand> boolean deserializeContent(T command, InvokeContext context)
                throws DeserializationException {
            ((RpcResponseCommand) command).setResponseObject(of(command.getHeader(), command.getContent()));
            return true;
        }
    }
}
