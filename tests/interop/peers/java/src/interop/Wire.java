package interop;

import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Map;

/** What all peers agree on: arguments, payloads, the one-field protobuf message `Blob {bytes data = 1;}`. */
final class Wire {
    private Wire() {}

    static Map<String, String> arguments(String[] arguments) {
        Map<String, String> map = new HashMap<>();
        for (String argument : arguments) {
            int at = argument.indexOf('=');
            if (at < 1) {
                throw new IllegalArgumentException("not key=value: " + argument);
            }
            map.put(argument.substring(0, at), argument.substring(at + 1));
        }
        return map;
    }

    /** Bytes that no other call of any client has (from a dozen bytes on): the number and the caller, repeated. */
    static byte[] payload(String caller, long number, int size) {
        byte[] pattern = (number + "#" + caller + "#").getBytes(StandardCharsets.UTF_8);
        byte[] data = new byte[size];
        for (int at = 0; at < size; at += pattern.length) {
            System.arraycopy(pattern, 0, data, at, Math.min(pattern.length, size - at));
        }
        return data;
    }

    static byte[] blob(byte[] data) {
        if (data.length == 0) {
            return data;
        }
        byte[] head = new byte[6];
        int used = 0;
        head[used++] = 0x0a;
        int rest = data.length;
        while (rest >= 0x80) {
            head[used++] = (byte) (rest | 0x80);
            rest >>>= 7;
        }
        head[used++] = (byte) rest;
        byte[] out = Arrays.copyOf(head, used + data.length);
        System.arraycopy(data, 0, out, used, data.length);
        return out;
    }

    static byte[] unblob(byte[] message) {
        if (message.length == 0) {
            return message;
        }
        if (message[0] != 0x0a) {
            throw new IllegalArgumentException("not a Blob: field " + message[0]);
        }
        int at = 1;
        int length = 0;
        for (int shift = 0; ; shift += 7) {
            byte next = message[at++];
            length |= (next & 0x7f) << shift;
            if (next >= 0) {
                break;
            }
        }
        if (length != message.length - at) {
            throw new IllegalArgumentException("a Blob of " + length + " bytes in " + message.length);
        }
        return Arrays.copyOfRange(message, at, message.length);
    }

    static String quote(String text) {
        return "\"" + String.valueOf(text).replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", "\\n")
                .replace("\t", "\\t").replace("\r", "") + "\"";
    }
}
